"""Precision is the device's: what auto takes, what is refused, what a resume keeps, and what reaches the compiler."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from inference import evaluate, generate
from modeling import GPTForCausalLM
from training import pretrain, resume
from training.config.arguments import GPTTrainingArguments
from training.config.recipe import load_recipe_file, load_run_recipe
from training.data.tokenizers import load_tokenizer
from training.model import devices, loading
from training.model.loading import load_model_and_tokenizer
from training.model.optimizers import Muon, orthogonalize
from training.run import Run
from training.system.errors import UserError

from .tiny_runs import grow, parse_flags, refused, tiny_argv, weights, words

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def native(monkeypatch):
    """Decide what the CPU multiplies natively: `native(True)`; its speeds are made up."""

    def decide(is_native: bool) -> None:
        for module in (devices, loading):
            monkeypatch.setattr(module, "is_native", lambda device, dtype: is_native or dtype == FP32)
        monkeypatch.setattr(devices, "measured", lambda device, dtype: 65.0 if dtype == FP32 else 1.3)

    return decide


def arguments(tmp_path, **changes) -> GPTTrainingArguments:
    return GPTTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)


# what a device can do


def test_an_x86_cpu_has_bf16_where_its_instructions_do_however_busy_it_is(monkeypatch) -> None:
    ask = devices.is_native.__wrapped__
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(devices, "measured", lambda device, dtype: pytest.fail("measured"))
    for says, amx, avx512, expected in ((1, 1, 1, True), (1, 0, 1, True), (1, 0, 0, False), (0, 1, 1, False)):
        monkeypatch.setattr(devices, "_torch_says_so", lambda dtype, says=says: bool(says))
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx))
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx512=avx512: bool(avx512))
        assert ask("cpu", BF16) is expected
    assert ask("cpu", FP32)


def test_another_cpu_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    for says, speed, expected in ((True, 400.0, True), (False, 400.0, False), (True, 12.0, False)):
        monkeypatch.setattr(devices, "_torch_says_so", lambda dtype, says=says: says)
        monkeypatch.setattr(devices, "measured", lambda device, dtype, speed=speed: 60.0 if dtype == FP32 else speed)
        assert devices.is_native.__wrapped__("cpu", BF16) is expected


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), True), ((8, 0), True), ((7, 5), False)])
def test_a_gpu_has_bf16_from_ampere_on(monkeypatch, capability: tuple, expected: bool) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0) if number else capability)
    assert devices.is_native.__wrapped__("cuda", BF16) is expected
    assert devices.is_native.__wrapped__("cuda", torch.float16)


def test_another_device_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(devices, "measured", lambda device, dtype: 100.0 if dtype == FP32 else 180.0)
    assert devices.is_native.__wrapped__("mps", BF16)


def test_the_two_variables_make_a_cpu_without_bf16() -> None:
    script = "import torch; from training.model.devices import is_native; print(is_native('cpu', torch.bfloat16))"
    variables = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": "."}
    assert subprocess.check_output([sys.executable, "-c", script], env=variables, text=True).strip() == "False"


# what a run takes


@pytest.mark.parametrize(
    ("asked", "is_native", "expected"),
    [
        ({}, True, "bf16"),
        ({}, False, "fp32"),
        ({"precision": "fp32"}, True, "fp32"),
        ({"bf16": False}, True, "fp32"),
        ({"fp16": False}, True, "bf16"),
        ({"precision": "bf16"}, True, "bf16"),
        ({"bf16": True}, True, "bf16"),
        ({"bf16": True, "force_precision": True}, False, "bf16"),
    ],
)
def test_what_is_chosen(tmp_path, native, asked: dict, is_native: bool, expected: str) -> None:
    native(is_native)
    args = arguments(tmp_path, **asked)
    assert (args.precision, args.bf16, args.fp16) == (expected, expected == "bf16", False)
    assert args.mixed_precision == {"fp32": "no", "bf16": "bf16"}[expected]


@pytest.mark.parametrize(
    ("device", "bf16", "dropout", "context", "masks", "expected"),
    [
        ("cpu", True, 0.0, 256, False, "eager"),
        ("cpu", True, 0.0, 1024, False, "sdpa"),
        ("cpu", True, 0.0, 1024, True, "eager"),
        ("cpu", True, 0.1, 1024, False, "eager"),
        ("cpu", False, 0.1, 64, False, "eager"),
        ("cpu", False, 0.0, 64, True, "sdpa"),
        ("cuda", True, 0.1, 64, False, "sdpa"),
        ("cuda", True, 0.0, 1024, True, "flex_attention"),
    ],
)
def test_attention_follows_a_rule(tiny_model, device, bf16, dropout, context, masks, expected) -> None:
    model = tiny_model(attention_dropout=dropout)
    model.set_attn_implementation("sdpa")
    devices.choose_attention(model, SimpleNamespace(device=torch.device(device), bf16=bf16), context, masks)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize("asked", [{"bf16": True}, {"precision": "bf16"}])
def test_what_is_only_emulated_is_refused_with_its_speed(tmp_path, native, asked: dict) -> None:
    native(False)
    with pytest.raises(
        UserError, match=r"precision=bf16: .*measured 1\.3 GFLOP/s, and 65\.0 in fp32.*--precision fp32"
    ):
        arguments(tmp_path, **asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"fp16": True}, "precision=fp16: .*GPUs"),
        ({"precision": "fp16", "force_precision": True}, "precision=fp16: .*GPUs"),
        ({"precision": "fp32", "bf16": True}, "contradict"),
        ({"precision": "bf16", "bf16": False}, "contradict"),
        ({"bf16": True, "fp16": True}, "contradict"),
        ({"precision": "f16"}, "did you mean 'fp16'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, native, asked: dict, words: str) -> None:
    native(True)
    with pytest.raises(UserError, match=words):
        arguments(tmp_path, **asked)


def test_the_launcher_is_heard_where_the_recipe_says_nothing(tmp_path, native, monkeypatch) -> None:
    native(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert arguments(tmp_path).precision_reason == "as accelerate launch says"
    assert arguments(tmp_path, precision="fp32").mixed_precision == "no"
    native(False)
    with pytest.raises(UserError, match=r"bf16.*emulates"):
        arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision=fp8"):
        arguments(tmp_path)


def test_a_flag_replaces_what_the_recipe_says_by_another_key() -> None:
    recipe = load_recipe_file("quickstart")
    for flags in ("--bf16 true", "--precision fp32", "--bf16 false"):
        recipe.update(parse_flags(words(flags)))
        given = {key: value for key, value in recipe.training.items() if key in devices.PRECISION_KEYS}
        assert list(given) == [flags.split()[0][2:]]


# a run, and its resume


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("precision")


@pytest.fixture(scope="module")
def half_run(folder):
    """A run in fp32 by its own choice."""
    return grow(folder, "--precision", "auto", "--bf16", "false", "--save_steps", "4", name="fp32")


def test_a_run_says_and_keeps_its_precision(half_run, native, capsys) -> None:
    assert yaml.safe_load((half_run / "recipe.yaml").read_text())["training"]["precision"] == "fp32"
    native(True)  # a better device does not change it
    assert load_run_recipe(half_run).training_arguments().precision == "fp32"


def test_a_run_in_bf16_does_not_go_on_emulated(half_run, native) -> None:
    native(False)
    line = refused(resume.main, str(half_run), "--max_steps", "9", "--precision", "bf16")
    assert "1.3 GFLOP/s" in line


def test_a_run_of_an_older_acorn_was_in_fp32(half_run, native, tmp_path) -> None:
    native(True)
    recipe = yaml.safe_load((half_run / "recipe.yaml").read_text())
    del recipe["training"]["precision"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert load_run_recipe(tmp_path).training_arguments().precision == "fp32"


def test_a_refused_run_has_written_nothing(folder, native, monkeypatch) -> None:
    native(False)
    monkeypatch.chdir(folder)
    before = set(folder.rglob("*"))
    assert "emulates" in refused(pretrain.main, *tiny_argv("--bf16", "true", name="refused"))
    assert set(folder.rglob("*")) == before


def test_the_line_says_what_accelerate_does(half_run) -> None:
    recipe = load_run_recipe(half_run)
    args = recipe.training_arguments()
    config = SimpleNamespace(num_hidden_layers=2, hidden_size=32, vocab_size=9, _attn_implementation="sdpa")
    trainer = SimpleNamespace(
        args=args,
        model=SimpleNamespace(config=config, num_parameters=lambda: 1),
        accelerator=SimpleNamespace(mixed_precision="no"),
        context_length=16,
        tokens_per_step=64,
        rows_per_step=4,
    )
    run = Run(recipe)
    run.trainer, run.corpus = trainer, SimpleNamespace(directory=None, summary=str)
    assert "fp32 (as asked)" in run.describe()
    trainer.accelerator.mixed_precision = "bf16"  # a DeepSpeed file of its own
    assert "bf16 (" in run.describe()


# Muon


def test_newton_schulz_is_in_what_the_device_multiplies(native) -> None:
    def dtype(**kwargs) -> torch.dtype:
        groups = [
            {"params": [torch.nn.Parameter(torch.eye(4))], "use_muon": hidden, "lr": 0.1} for hidden in (True, False)
        ]
        return Muon(groups, {}, **kwargs)._dtype

    native(True)
    assert (dtype(), dtype(precision="bf16"), dtype(precision="fp32")) == (BF16, BF16, FP32)
    native(False)
    assert (dtype(), dtype(precision="bf16"), dtype(precision="fp32")) == (FP32, FP32, FP32)


def test_newton_schulz_in_both_is_near() -> None:
    matrices = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0))
    full, half = orthogonalize(matrices, dtype=FP32), orthogonalize(matrices, dtype=BF16)
    assert (full.dtype, half.dtype) == (FP32, BF16)
    assert (full - half.float()).norm() < 0.05 * full.norm()


# generate and evaluate


@pytest.fixture(scope="module")
def half_model(half_run, tmp_path_factory):
    """The run's model, saved in bf16."""
    directory = tmp_path_factory.mktemp("half")
    GPTForCausalLM.from_pretrained(half_run, dtype=BF16).save_pretrained(directory)
    load_tokenizer(str(half_run)).save_pretrained(directory)
    return str(directory)


def test_half_weights_are_read_as_float32_where_half_is_emulated(half_model, native) -> None:
    for is_native, forced, expected in ((True, False, BF16), (False, False, FP32), (False, True, BF16)):
        native(is_native)
        assert load_model_and_tokenizer(half_model, force_precision=forced)[0].dtype == expected


def test_an_emulated_dtype_is_refused_by_generate_and_evaluate(half_model, native) -> None:
    native(False)
    assert "dtype=bfloat16" in refused(generate.main, half_model, "--dtype", "bfloat16")
    assert "--bf16" in refused(evaluate.main, half_model, "--bf16")


# torch.compile


@pytest.fixture
def compiled(monkeypatch) -> list[dict]:
    """What torch.compile is called with; nothing is compiled."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    return calls


@pytest.mark.parametrize(("scope", "times"), [("blocks", 2), ("model", 1)])
@pytest.mark.parametrize("asks", ["--torch_compile true", ""], ids=["asked", "implied"])
def test_mode_and_backend_reach_the_compiler_once(folder, compiled, scope: str, times: int, asks: str) -> None:
    flags = f"{asks} --compile_scope {scope} --torch_compile_mode max-autotune --torch_compile_backend aot_eager"
    run = grow(folder, *words(flags), "--max_new_tokens", "0", name=f"compiled-{scope}-{bool(asks)}")
    assert [(call["backend"], call["mode"]) for call in compiled] == [("aot_eager", "max-autotune")] * times
    assert not any("_orig_mod" in name for name in weights(run))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--torch_compile_mode fast", "torch_compile_mode 'fast': did you mean 'default'"),
        ("--torch_compile_backend inducter", "torch_compile_backend 'inducter': did you mean 'inductor'"),
        ("--torch_compile true --compile_scope all", "compile_scope 'all'"),
    ],
)
def test_a_wrong_compilation_is_refused(flags: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_flags(words(flags))


def test_what_the_launcher_compiles_is_not_compiled_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="dynamo_backend=inductor"):
        arguments(tmp_path, torch_compile=True)
    assert arguments(tmp_path, torch_compile=True, compile_scope="model").compile_blocks is None


# TF32


@pytest.mark.parametrize(("device", "tf32", "expected"), [("cuda", None, "high"), ("cuda", False, "highest")])
def test_tf32_is_on_where_a_gpu_multiplies_fp32(monkeypatch, device: str, tf32: bool | None, expected: str) -> None:
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    devices.allow_tf32(SimpleNamespace(device=torch.device(device), tf32=tf32))
    devices.allow_tf32(SimpleNamespace(device=torch.device("cpu"), tf32=None))
    assert set_to == [expected]
