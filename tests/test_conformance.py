"""transformers' own tests of every model over our variants; what is refused on purpose is named below.

ACORN_CONFORMANCE chooses the variants: all of them (`make conformance`, an hour), or some (`make test-slow`).
"""

import copy
import os
import unittest
from unittest import mock

import pytest
import torch

from modeling import GPTConfig, GPTForCausalLM, GPTModel

from .transformers_tests import common_tests, is_fetched
from .variants import VARIANTS, tiny_config

pytestmark = pytest.mark.slow

SOME = ("gpt2", "rope_yarn", "mixed_layers", "shared_kv_two_groups", "modern")
CHOICES = {"all": VARIANTS, "some": {name: VARIANTS[name] for name in SOME}}
CHOSEN = CHOICES.get(os.environ.get("ACORN_CONFORMANCE", ""))

if CHOSEN is None:
    pytest.skip("`make conformance` runs them", allow_module_level=True)
if not is_fetched():
    pytest.skip("transformers' tests are not here: python -m tests.transformers_tests", allow_module_level=True)
common = common_tests()


class Tester:
    """What the common tests ask of a model: a small configuration and inputs for it."""

    batch_size, seq_length, is_training = 2, 7, True

    def __init__(self, **overrides):
        self.overrides = {"pad_token_id": 0, **overrides}
        config = self.get_config()
        for name in "hidden_size num_hidden_layers num_attention_heads vocab_size".split():
            setattr(self, name, getattr(config, name))

    def get_config(self):
        return tiny_config(**copy.deepcopy(self.overrides))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


TABLES = (common.MODEL_MAPPING_NAMES, common.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class Common(common.ModelTesterMixin):
    """The common tests with what they would look up by the class's name, which transformers does not know."""

    all_model_classes = (GPTModel, GPTForCausalLM)
    variant: dict = {}

    def setUp(self):
        self.model_tester = Tester(**self.variant)
        for names, model_class in zip(TABLES, self.all_model_classes, strict=True):
            self.enterContext(mock.patch.dict(names, {GPTConfig.model_type: model_class.__name__}))


# What is not run, by the beginning of its name: (for which configurations, why).
LEFT_OUT = {
    "test_generation_tester_mixin_inheritance": (
        lambda config: True,
        "transformers' source distribution leaves its tests of generate() out; ours are test_model_abilities.py's",
    ),
    "test_bc_cache_name_forward": (
        lambda config: True,
        "past_key_values is accepted beside cache without a warning: both are names of the tested range",
    ),
    "test_model_rope": (
        lambda config: config.position_encoding != "rope" or config.residual_init == "zero",
        "rope_parameters are refused where nothing rotates, and a zeroed projection lets no position through",
    ),
    "test_num_layers_is_small": (
        lambda config: config.num_hidden_layers > 2,
        "a rule about the size of their own tests; sharing needs more than two layers",
    ),
    "test_causal_lm_loss_honors_shift_labels": (
        lambda config: config.zero_init_head,
        "a zeroed head says the same of every label",
    ),
    "test_model_forward_default_config_values": (
        lambda config: config.zero_init_head,
        "it takes tie_word_embeddings' default, which zero_init_head refuses: a tied head is the embedding",
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": (
        lambda config: "reuse" in (config.kv_sharing_modes or ()),
        "refused: with shared keys and values its gradients would be wrong",
    ),
}


def build(name: str, variant: dict) -> type[unittest.TestCase]:
    """The common tests of one variant, less those that are left out."""
    config = Tester(**variant).get_config()
    body = {"variant": variant}
    for beginning, (applies, why) in LEFT_OUT.items():
        names = [test for test in dir(Common) if test.startswith(beginning)] if applies(config) else []
        body |= {test: unittest.skip(why)(lambda self: None) for test in names}
    return type(f"Test_{name}", (Common, unittest.TestCase), body)


globals().update({f"Test_{name}": build(name, variant) for name, variant in CHOSEN.items()})
