"""The parts of benchmarks/gpu.py that train nothing.

Each takes a device's name and returns figures, with an "error" among them where they are not as they should be.
"""

import copy
import importlib.util
import platform
import time

import accelerate
import torch
import transformers

from benchmarks import placement as placing
from benchmarks.gpu_training import sizes
from modeling import GPTConfig, GPTForCausalLM
from tests.variants import VARIANTS, randomize, tiny_config
from training.model.devices import known_gpu


def machine(device: str) -> dict:
    """What the figures are of."""
    figures = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    figures["accelerate"] = accelerate.__version__
    if device != "cuda":
        return figures
    properties = torch.cuda.get_device_properties(0)
    gpu = known_gpu(properties.name)
    peaks = {precision: gpu.peak(precision) if gpu else None for precision in ("bf16", "fp32")}
    return figures | {"gpu": properties.name, "memory_bytes": properties.total_memory, "peak_flops": peaks}


# ---- placement


def placement(device: str) -> dict:
    """Every variant under SDPA and eager attention, watched op by op."""
    configs = {name: tiny_config(**{**variant, **placing.DROPOUT}) for name, variant in VARIANTS.items()}
    found = [placing.watch_all(configs, torch.device(device), attention) for attention in ("sdpa", "eager")]
    ours = {
        f"{figures['attention']}/{name}": what
        for figures in found
        for name, what in figures["wrong"].items()
        if isinstance(what, str) or any("modeling_rope_utils" not in line for line in what)  # transformers' own
    }
    looks = sorted({line for figures in found for line in figures["looks"]})
    return {"variants": len(configs), "looks_at_numbers": looks} | ({"error": ours} if ours else {})


# ---- attention


SHAPES = {
    "grouped": {"num_key_value_heads": 2},
    "sliding": {"sliding_window": 100, "position_encoding": "rope", "qk_norm": True},
    "shared": {"kv_sharing_modes": ["store", "reuse"], "position_encoding": "rope"},
}
ATTENTION = {"hidden_size": 256, "num_attention_heads": 4, "max_position_embeddings": 512, "vocab_size": 512}


def attention(device: str) -> dict:
    """Flash attention, if it is there, and SDPA against eager attention."""
    has_flash = importlib.util.find_spec("flash_attn") is not None
    figures = compared(device, ("eager", "sdpa", *(("flash_attention_2",) if has_flash else ())))
    return figures if has_flash else {"flash_attention_2": "flash_attn is not installed", **figures}


def flex(device: str) -> dict:
    """The same of flex attention, which is compiled for each kind of rows."""
    return compared(device, ("flex_attention",))


def compared(device: str, backends: tuple[str, ...]) -> dict:
    """Each backend in bf16 against eager attention in float32: largest difference of logits over their spread.

    Rows are whole, packed from two documents, and padded on the left.
    """
    worst, wrong = dict.fromkeys(backends, 0.0), {}
    for shape, overrides in SHAPES.items():
        model = GPTForCausalLM(tiny_config(**{**ATTENTION, **overrides})).eval()
        randomize(model)
        for parameter in model.parameters():
            parameter.data *= 0.5 if parameter.dim() == 1 else 0.15
        half = copy.deepcopy(model.to(device)).to(torch.bfloat16)
        for rows, inputs in inputs_on(device).items():
            kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
            expected = logits_of(model, "eager", inputs)[kept]
            for backend in backends:
                try:
                    difference = logits_of(half, backend, inputs)[kept] - expected
                except Exception as error:
                    wrong[f"{backend}/{shape}/{rows}"] = f"{type(error).__name__}: {error}"[:200]
                    continue
                share = float(difference.abs().max() / expected.std())
                worst[backend] = max(worst[backend], share)
                if not share < 0.1:
                    wrong[f"{backend}/{shape}/{rows}"] = share
    return {"largest_difference": worst} | ({"error": wrong} if wrong else {})


def inputs_on(device: str) -> dict[str, dict]:
    """The three kinds of rows: (2, 256) ids."""
    ids = torch.randint(0, 512, (2, 256), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    positions = torch.cat((torch.arange(100), torch.arange(156))).expand(2, -1).to(device)
    return {
        "whole": {"input_ids": ids},
        "packed": {"input_ids": ids, "position_ids": positions},
        "padded": {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)},
    }


@torch.no_grad()
def logits_of(model: GPTForCausalLM, backend: str, inputs: dict) -> torch.Tensor:
    model.set_attn_implementation(backend)
    return model(**inputs, use_cache=False).logits.float()


# ---- generation and memory


@torch.no_grad()
def generate(device: str) -> dict:
    """Greedy text of two prompts in float32 by a growing cache and by a static one, and what a token takes in bf16."""
    torch.manual_seed(0)
    model = GPTForCausalLM(GPTConfig(**sizes(device))).to(device).eval()
    for parameter in model.parameters():  # far from ties
        parameter.mul_(3)
    ids = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    caches = ("dynamic", "static")
    texts = {cache: written(model, ids, cache) for cache in caches}
    figures = {"equal": bool(torch.equal(*texts.values()))}
    model = model.to(torch.bfloat16)
    for cache in caches:
        written(model, ids[:1], cache)  # compiles
        started = time.perf_counter()
        tokens = written(model, ids[:1], cache).shape[1] - ids.shape[1]
        figures[f"{cache}_ms_a_token"] = 1e3 * (time.perf_counter() - started) / tokens
    return figures | ({} if figures["equal"] else {"error": "the two caches write different text"})


def written(model: GPTForCausalLM, ids: torch.Tensor, cache: str) -> torch.Tensor:
    mask, count = torch.ones_like(ids), 32
    ends = {"eos_token_id": None, "pad_token_id": 0, "cache_implementation": cache}
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, **ends).cpu()


def memory(device: str) -> dict:
    """What `acorn estimate` foretells of a training step and of an evaluation, and what they take."""
    from benchmarks.peak_memory import measure

    if device != "cuda":
        return measure("shakespeare-char-cpu", ["--bf16", "false"])
    return measure("gpt2-openwebtext", ["--torch_compile", "false"])
