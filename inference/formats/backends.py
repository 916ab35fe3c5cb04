"""Whether vLLM and SGLang can run a directory through their Transformers backends, requirement by requirement.

Both load the base model that `auto_map` names and put an attention function of their own in the place of transformers':
it finds the layer's key-value cache by `module.layer_idx` in `attention_instances`, which travels through the model as
a keyword. (vLLM, "Writing custom models" in docs/models/supported_models.md; SGLang, srt/models/transformers.py.)
"""

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AttentionInterface

from modeling import GPTConfig, GPTForCausalLM
from training.system.errors import UserError
from training.system.files import read_json
from training.system.shell import shell

from .acorn import Acorn
from .base import open_source
from .conversion import recognise

NAME = "acorn_backend_check"
TOLERANCE = 1e-4  # of hidden states up to 1
TEXT_TOKENS = 24
KERNEL_HEADS = 8  # what attention kernels of GPUs want head_dim to be a multiple of
THEIR_SOFTCAP = "final_logit_softcapping"
GOOD, LIMIT, MISSING = "ok", "limit", "missing"
Line = tuple[str, str]


def check(name: str) -> list[Line]:
    """(status, what was found) of every requirement; UserError for what is no local directory of Acorn's."""
    source = open_source(name)
    found = recognise(source)
    if not isinstance(found, Acorn) or not source.directory.is_dir():
        what = "is no local directory" if isinstance(found, Acorn) else f"is {found.title}, which needs no custom code"
        raise UserError(f"{name}: {what}; --format vllm-check is for a run or model directory of Acorn's")
    model = found.load(source)
    config = model.config
    return [*files(source.directory), *attention(model), *heads(config), *head(config), *parallel(config)]


def report(name: str) -> list[str]:
    """The requirements in lines; UserError after them where one is missing."""
    lines = check(name)
    printed = [f"{status:<8} {what}" for status, what in lines]
    lacking = [what for status, what in lines if status == MISSING]
    if lacking:
        print("\n".join(printed))
        raise UserError(f"{name}: vLLM and SGLang would not run it as it is: {'; '.join(lacking)}")
    serve = shell("vllm", "serve", name, "--model-impl", "transformers", "--trust-remote-code")
    return [*printed, f"Next, where vLLM is installed:\n  {serve}"]


def files(directory: Path) -> Iterator[Line]:
    """What has to lie in the directory."""
    named = read_json(directory / "config.json").get("auto_map")
    auto_map = {key: entry for key, entry in named.items() if isinstance(entry, str)} if isinstance(named, dict) else {}
    for entry in ("AutoConfig", "AutoModel"):
        is_there = entry in auto_map
        yield (GOOD if is_there else MISSING, f"config.json: auto_map.{entry}={auto_map.get(entry)!r}")
    broken: list[str] = []
    needed = imported(directory, {f"{entry.split('.')[0]}.py" for entry in auto_map.values()}, broken)
    found = f"code: {', '.join(sorted(needed))}"
    yield (MISSING, f"code: {', '.join(sorted(broken))} not there, or damaged") if broken else (GOOD, found)
    has_weights = any(directory.glob("*.safetensors"))
    yield (GOOD if has_weights else MISSING, "weights: model.safetensors" + (" is there" if has_weights else ""))
    has_tokenizer = (directory / "tokenizer.json").is_file()
    yield (GOOD if has_tokenizer else LIMIT, "tokenizer.json" + ("" if has_tokenizer else ": none; only ids go in"))


def imported(directory: Path, names: set[str], broken: list[str]) -> set[str]:
    """The names of these Python files and of all that they import by `from .x import y`; no code is run.

    broken: where the names of those go that are not there, or cannot be read.
    """
    found, waiting = set(), set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        try:
            tree = ast.parse((directory / name).read_bytes())
        except (OSError, SyntaxError, ValueError):
            broken.append(name)
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level and node.module)
        waiting |= {f"{node.module}.py" for node in nodes} - found
    return found


class Instance:
    """A layer's attention as those backends do it: over one flat row of several texts, told apart by itself.

    texts: (tokens), to which text a token belongs.
    """

    def __init__(self, config: GPTConfig, layer: int, texts: torch.Tensor):
        sliding = config.layer_types[layer] == "sliding_attention"
        ago = torch.arange(len(texts))[:, None] - torch.arange(len(texts))
        window = config.sliding_window if sliding else len(texts)
        self.hidden = (ago < 0) | (ago >= window) | (texts[:, None] != texts)
        self.head_dim = config.head_dim
        self.calls = 0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """query: (tokens, heads * head_dim); key, value: (tokens, kv_heads * head_dim). The shape of query."""
        self.calls += 1
        queries, keys, values = (states.unflatten(-1, (-1, self.head_dim)) for states in (query, key, value))
        groups = queries.shape[1] // keys.shape[1]
        keys, values = (states.repeat_interleave(groups, dim=1) for states in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scaling
        weights = scores.masked_fill(self.hidden, -math.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, values).reshape(query.shape)


def outside_attention(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    """What a backend registers: it leaves the mask alone, and flattens heads and batch."""
    flat = (states.transpose(1, 2).flatten(2)[0] for states in (query, key, value))
    return attention_instances[module.layer_idx].forward(*flat, scaling)[None], None


@torch.no_grad()
def attention(model: GPTForCausalLM) -> Iterator[Line]:
    """Drive the base model as a backend does, two texts in one row, and compare its hidden states with its own."""
    base, config = model.model, model.config
    if "linear_attention" in config.layer_types:
        yield (MISSING, "layer_types: linear_attention has a state, and a backend's attention holds keys and values")
        return
    if config.kv_lora_rank is not None:
        why = "the layers hold latents, and a backend's attention keys and values of one width"
        yield (MISSING, f"kv_lora_rank={config.kv_lora_rank}: {why}")
        return
    if config.bigram_vocab_size is not None:
        why = "the token before is in the model's own cache, which a backend does not keep"
        yield (MISSING, f"bigram_vocab_size={config.bigram_vocab_size}: {why}")
        return
    yield (GOOD if type(base).is_backend_compatible() else MISSING, "GPTModel._supports_attention_backend")
    length = min(TEXT_TOKENS, config.max_position_embeddings)
    ids = (torch.arange(2 * length) * 7 % config.vocab_size).view(2, length)
    expected = base(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    texts, positions = torch.arange(2).repeat_interleave(length), torch.arange(length).repeat(2)
    instances = {layer: Instance(config, layer, texts) for layer in range(config.num_hidden_layers)}
    AttentionInterface.register(NAME, outside_attention)
    kept = config._attn_implementation
    config._attn_implementation = NAME
    try:
        options = {"use_cache": False, "return_dict": False, "attention_instances": instances}
        found = base(input_ids=ids.view(1, -1), inputs_embeds=None, position_ids=positions[None], **options)[0][0]
    finally:
        config._attn_implementation = kept
    reached = sum(instance.calls == 1 for instance in instances.values())
    is_whole = reached == len(instances)
    yield (GOOD if is_whole else MISSING, f"keywords reach the attention of {reached} of {len(instances)} layers")
    difference = (found - expected).abs().max().item()
    is_same = difference <= TOLERANCE * max(1.0, expected.abs().max().item())
    yield (GOOD if is_same else MISSING, f"attention from outside: hidden states differ by {difference:.0e}")


def heads(config: GPTConfig) -> Iterator[Line]:
    """What the attention kernels need to know, and take."""
    kinds = ", ".join(dict.fromkeys(config.layer_types))
    yield (GOOD, f"layer_types: {kinds}" + (f", sliding_window={config.sliding_window}" if "sliding" in kinds else ""))
    fits = config.head_dim % KERNEL_HEADS == 0
    note = "" if fits else f": most kernels of GPUs take multiples of {KERNEL_HEADS}"
    yield (GOOD if fits else LIMIT, f"head_dim={config.head_dim}{note}")


def head(config: GPTConfig) -> Iterator[Line]:
    """The head belongs to the backend: what ours does beside multiplying is lost."""
    if config.logit_softcap is not None:
        is_read = getattr(config, THEIR_SOFTCAP, None) == config.logit_softcap
        what = f"logit_softcap={config.logit_softcap}: their heads read it as {THEIR_SOFTCAP}"
        yield (GOOD, what) if is_read else (MISSING, f"{what}, which is not there, and would cap nothing")
    if config.lm_head_bias:
        yield (LIMIT, "lm_head_bias=True: vLLM's newer versions alone read a bias of the head")


def parallel(config: GPTConfig) -> Iterator[Line]:
    """How many devices can share the model."""
    most = math.gcd(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    plan = config.base_model_tp_plan
    yield (
        GOOD if plan else LIMIT,
        f"tensor parallel: base_model_tp_plan has {len(plan or {})} entries, up to {most} devices",
    )
    adds = config.position_encoding in ("learned", "sinusoidal")
    why = (
        f"position_encoding={config.position_encoding!r} would be added" if adds else "embedding_norm would be applied"
    )
    if adds or config.embedding_norm:
        yield (LIMIT, f"pipeline parallel: one stage; at the next ones {why} again")
    else:
        yield (LIMIT, "pipeline parallel: no base_model_pp_plan; vLLM's newer versions find the split by themselves")
