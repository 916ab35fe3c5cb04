"""Figures of `acorn estimate`, against the models themselves and nanoGPT's published run."""

import pytest
import torch
from torch import nn

from modeling import GPTConfig, GPTForCausalLM
from tests.variants import VARIANTS
from training.costs import estimate_recipe, memory
from training.errors import UserError
from training.estimate import duration, main
from training.hardware import GPUS, flops_per_token, matrix_parameters
from training.recipe import load_recipe_file

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61, "block_size": 32}


@pytest.mark.parametrize("name", VARIANTS)
def test_matrix_parameters_are_the_models(name):
    config = GPTConfig(**{**SMALL, **VARIANTS[name]})
    with torch.device("meta"):
        model = GPTForCausalLM(config)
    assert matrix_parameters(config) == sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def test_flops_a_token_follow_the_palm_formula():
    config = GPTConfig(vocab_size=50304, bias=False)
    assert flops_per_token(config) == 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024


def test_a_sliding_window_costs_less():
    full = GPTConfig(**SMALL)
    sliding = GPTConfig(**SMALL, sliding_window=8)
    assert flops_per_token(full) - flops_per_token(sliding) == 12 * 2 * 32 * (32 - 8)


def test_gpt2_on_eight_a100_takes_about_nanogpts_four_days():
    estimate = estimate_recipe(load_recipe_file("gpt2-openwebtext"), num_gpus=8)
    assert estimate.tokens_per_step == 491_520
    days = estimate.seconds(GPUS["a100-40gb"][0], mfu=0.3, num_gpus=8) / 86400
    assert days == pytest.approx(4, rel=0.15)


def test_memory_counts_four_bytes_a_parameter_and_the_optimizers_state():
    recipe = load_recipe_file("shakespeare-char-cpu")
    args = recipe.training_arguments()
    model = GPTForCausalLM(recipe.model_config())
    figures, parameters = memory(model, args, 768), model.num_parameters()
    assert figures["weights"] == figures["gradients"] == 4 * parameters
    assert figures["optimizer"] == 8 * parameters
    args.optimizer = "muon"
    in_blocks = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert memory(model, args, 768)["optimizer"] == 8 * parameters - 4 * in_blocks


def test_checkpointing_keeps_less():
    recipe = load_recipe_file("shakespeare-char-cpu")
    args, model = recipe.training_arguments(), GPTForCausalLM(recipe.model_config())
    whole = memory(model, args, 768)["activations"]
    args.gradient_checkpointing = True
    assert memory(model, args, 768)["activations"] < whole / 2


def test_the_command_prints_all_figures(capsys):
    main(["gpt2-openwebtext", "--num_gpus", "8", "--gpu", "a100-40gb"])
    printed = capsys.readouterr().out
    for word in (
        "124,373,760",
        "FLOPs a token",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "3.9 days",
        "30% MFU",
    ):
        assert word in printed


def test_flags_change_the_recipe(capsys):
    main(["quickstart", "--n_layer", "1", "--max_steps", "7"])
    assert "in 7 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"), [(["--gpu", "h20O"], "h200"), (["--num_gpus", "0"], "num_gpus=0"), (["--mfu", "2"], "mfu=2")]
)
def test_bad_flags_are_refused_in_one_line(flags, named):
    with pytest.raises(UserError, match=named) as caught:
        main(["quickstart", *flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"), [(30, "30 seconds"), (90, "1.5 minutes"), (7200, "2.0 hours"), (86400 * 3, "3.0 days")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
