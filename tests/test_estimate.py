"""Figures of `acorn estimate`, against the models themselves and nanoGPT's published run."""

import json

import pytest
import torch
from torch import nn

from modeling import GPTConfig, GPTForCausalLM
from tests.variants import VARIANTS
from training.config.command_line import load_recipe
from training.config.recipe import load_recipe_file
from training.costs import config_of, estimate_recipe, evaluation_bytes, memory
from training.data.corpus import FORMAT
from training.data.tokenizers import build_byte
from training.estimate import duration, main
from training.loop.evaluation import chunk_elements
from training.model.devices import GPUS, device_peak_flops, known_gpu
from training.model.sizes import flops_per_token, matrix_parameters
from training.system.errors import UserError

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


def test_evaluation_is_counted_where_it_is_the_peak():
    recipe = load_recipe_file("shakespeare-char-cpu")
    recipe.training["per_device_eval_batch_size"] = 1
    in_training = estimate_recipe(recipe)
    assert in_training.peak() == sum(in_training.memory.values())
    recipe.training["per_device_eval_batch_size"] = 10_000
    in_evaluation = estimate_recipe(recipe)
    held = in_evaluation.memory["weights"] + in_evaluation.memory["optimizer"]
    assert in_evaluation.peak() == held + in_evaluation.evaluation > sum(in_evaluation.memory.values())


def test_evaluations_are_a_share_of_the_work_that_is_said_where_it_is_known(tmp_path, capsys):
    manifest = {"format": FORMAT, "format_version": 1, "splits": {"validation": {"tokens": 76_800}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    prepared, streamed = ["--data_dir", str(tmp_path)], ["--streaming", "--validation_characters", "76800"]
    words = "shakespeare-char-cpu --max_steps 100 --tokenizer byte".split()  # 76,800 tokens
    said = [(prepared, "evaluation           2 times 76,800 tokens: 40.0% of the work\n")]
    said += [(streamed, "2 times 76,800 characters: 40.0% of the work, were each a token\n")]
    for source, line in said:
        main([*words, "--eval_steps", "60", *source])
        assert line in capsys.readouterr().out
        main([*words, "--eval_strategy", "epoch", *source])
        assert "of the work" not in capsys.readouterr().out
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 999}))
    assert config_of(load_recipe("estimate", ["shakespeare-char-cpu", *prepared])).vocab_size == 999
    build_byte().save_pretrained(tmp_path / "bytes")
    assert config_of(load_recipe("estimate", ["quickstart", "--tokenizer", str(tmp_path / "bytes")])).vocab_size == 257
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not of format acorn-corpus 1"):
        main([*words, *prepared])


def test_evaluation_holds_one_chunk_of_logits_whatever_its_batch():
    """32 x 1,024 x 50,304 logits in bf16 and in float32 were 10 GB."""
    args, config = load_recipe_file("shakespeare-char-cpu").training_arguments(), GPTConfig(vocab_size=50304)
    args.bf16 = False  # whatever this machine would take
    states, device = 4 * config.hidden_size * 1024, torch.device("cpu")
    chunk = 8 * chunk_elements(device)
    for args.per_device_eval_batch_size in (8, 32):
        blocks = (20 * config.hidden_size + 8 * config.intermediate_size) * args.per_device_eval_batch_size * 1024
        head = states * args.per_device_eval_batch_size + chunk
        assert evaluation_bytes(config, args, device) == max(blocks, head)


DEVICES = {
    "NVIDIA L40S": "l40s",
    "NVIDIA L4": "l4",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "Tesla V100-PCIE-32GB": "v100-pcie-32gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "NVIDIA GeForce RTX 3090": "rtx-3090",
    "NVIDIA A10G": "a10g",
    "NVIDIA A10": "a10",
    "Tesla T4": "t4",
}


@pytest.mark.parametrize("name", DEVICES)
def test_gpus_are_known_by_the_names_of_their_drivers(name):
    assert known_gpu(name)[:2] == GPUS[DEVICES[name]][:2]


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA T400 4GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "AMD Radeon RX 7900 XTX",
        "",
    ],
)
def test_other_devices_have_no_peak(name):
    assert known_gpu(name) is None


def test_the_peak_is_that_of_the_precision(monkeypatch):
    peaks = {}
    for name in ("NVIDIA A100-SXM4-40GB", "Tesla T4", "NVIDIA T400 4GB"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        cuda = torch.device("cuda")
        peaks[name.split()[1][:4]] = [device_peak_flops(cuda, precision) for precision in ("bf16", "fp16", "fp32")]
        assert device_peak_flops(cuda, "") is None
    assert peaks == {"A100": [312e12, 312e12, 156e12], "T4": [None, 65e12, 8.1e12], "T400": [None, None, None]}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert device_peak_flops(torch.device("cuda"), "fp32", tf32=False) is None  # its plain fp32 peak is not listed


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


def test_the_time_is_that_of_what_the_gpu_has(capsys):
    main(["gpt2-openwebtext", "--gpu", "t4"])
    assert "8.1 TFLOP/s in fp32" in capsys.readouterr().out
    main(["gpt2-openwebtext", "--gpu", "t4", "--precision", "fp16"])
    assert "65 TFLOP/s in half" in capsys.readouterr().out
    with pytest.raises(UserError, match="precision=bf16"):
        main(["gpt2-openwebtext", "--gpu", "t4", "--precision", "bf16"])


def test_what_to_lower_is_what_does_not_fit(capsys):
    main(["gpt2-openwebtext", "--gpu", "t4", "--per_device_eval_batch_size", "1000"])
    assert "lower per_device_eval_batch_size" in capsys.readouterr().out


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
