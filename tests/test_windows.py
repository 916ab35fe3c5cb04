"""Past the context: a window of the text is read, and strategies see all of it; in a batch as one by one."""

import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from training.model.loading import with_cache_names
from training.model.sampling import context_left, continue_ids
from training.model.windows import has_learned_positions

from .variants import VARIANTS, WITHOUT_KEYS, random_model, tiny_config

LENGTHS = (1, 9, 31, 32)  # of prompts; the context is 32
SHAPES = ["gpt2", "rope_by_layer", "mixed_layers", "modern"]
# A memory reads on past the context: padding moves its segments, and drafts are refused there (test_lanes.py).
WINDOWED = [pytest.param(n, marks=[] if n in SHAPES else pytest.mark.slow) for n in VARIANTS if n != "memory"]


@pytest.fixture
def prompts() -> list[list[int]]:
    """Ragged rows of ids."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in LENGTHS]


def endless(name: str, **overrides):
    """The variant of that name, which no token ends."""
    model = random_model(tiny_config(**VARIANTS[name] | overrides))
    model.generation_config.eos_token_id = None
    return model


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows that are filled up on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_a_padded_batch_is_its_rows(name: str, strategy: dict, prompts) -> None:
    model = endless(name)
    ids, mask = padded(prompts)
    together = continue_ids(model, ids, 40, attention_mask=mask, do_sample=False, **strategy)[:, ids.shape[1] :]
    alone = [continue_ids(model, torch.tensor([p]), 40, do_sample=False, **strategy)[:, len(p) :] for p in prompts]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", [name for name in WINDOWED if name.values[0] not in WITHOUT_KEYS])
def test_drafts_change_nothing(name: str, prompts) -> None:
    model = endless(name)
    old = version.parse(transformers.__version__)
    if "sliding_attention" in model.config.layer_types and old < version.parse("5.18"):
        pytest.skip("transformers 5.17 cannot take back what a sliding window has let go; `acorn generate` refuses it")
    if "reuse" in (model.config.kv_sharing_modes or ()) and old < version.parse("5.23"):
        pytest.skip("before 5.23 transformers cannot crop layers without keys; `acorn generate` refuses it")
    for prompt in prompts[1:]:
        start = torch.tensor([prompt])
        greedy = continue_ids(model, start, 40, do_sample=False)
        for draft in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": model}):
            assert torch.equal(continue_ids(model, start, 40, do_sample=False, **draft), greedy)


@pytest.mark.parametrize("penalty", [{"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}], ids=str)
def test_penalties_see_the_whole_text(penalty: dict, ids) -> None:
    """As by hand: the window's logits, penalised for all that was written."""
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    model = endless("rope")
    name, value = next(iter(penalty.items()))
    kind = {
        "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    }
    processor, expected, first = kind[name](value), ids[:1, :5], 0
    for _ in range(60):
        if expected.shape[1] - first > 32:
            first = expected.shape[1] - 16
        logits = processor(expected, model(expected[:, first:]).logits[:, -1].detach().clone())
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(continue_ids(model, ids[:1, :5], 60, do_sample=False, **penalty), expected)


ADAPTERS = {
    "lora": lambda: LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_read_windows_too(adapter: str, positions: str, ids) -> None:
    """Greedy by hand, a whole forward pass a token; virtual tokens come before every window, and take their places."""
    base = endless("gpt2", position_encoding=positions)
    model = with_cache_names(get_peft_model(base, ADAPTERS[adapter]())).eval()
    context, expected, first = 32 if adapter == "lora" else 28, ids[:2, :5], 0
    assert context_left(model) == context
    for _ in range(50):
        if expected.shape[1] - first > context:
            first = expected.shape[1] - context // 2
        with torch.no_grad():
            logits = model(input_ids=expected[:, first:]).logits[:, -1]
        expected = torch.cat((expected, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(continue_ids(model, ids[:2, :5], 50, do_sample=False), expected)


@pytest.mark.parametrize("name", ["rope", "sinusoidal", "no_positions", "sliding_rope"])
def test_positions_that_go_on_can_be_extrapolated(name: str, ids) -> None:
    variants = {"sliding_rope": {"sliding_window": 5, "position_encoding": "rope"}}
    model = random_model(tiny_config(**(VARIANTS | variants)[name]))
    model.generation_config.eos_token_id = None
    assert not has_learned_positions(model)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert torch.equal(continue_ids(model, ids, 40, beyond_context="extrapolate", do_sample=False), expected)


def test_the_models_own_function_is_back(ids) -> None:
    model = endless("gpt2")
    assert has_learned_positions(model)
    continue_ids(model, ids, 40, do_sample=False)
    assert "prepare_inputs_for_generation" not in vars(model)
