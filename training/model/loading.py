"""A causal LM, or an adapter on its base, from a run directory, a checkpoint, a model directory or a Hub id."""

import hashlib
import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from modeling import GPTConfig, GPTForCausalLM
from modeling.compat import CACHE_NAME
from modeling.configuration_gpt import OLD_MODEL_TYPE

from ..data.tokenizers import add_nothing, load_tokenizer
from ..system.errors import UserError, log_once, one_line, unknown
from ..system.files import read_json
from ..system.pickles import UNREADABLE, why_unreadable
from ..system.run_files import verify
from .devices import best_device, is_native, refuse_emulated
from .sizes import text_config

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUR_TYPES = (GPTConfig.model_type, OLD_MODEL_TYPE)
ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "base_model.json"  # beside an adapter: which base it was trained on, and how to know it again


def load_causal_lm(name: str, dtype: str = "auto", trust_remote_code: bool = False, **options):
    """The model that `name` holds, in eval mode.

    Our own architecture is loaded from the installed code; code that a directory or a Hub id brings runs only with
    `trust_remote_code`. options: more of from_pretrained's. Raises UserError for what is no causal LM.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    verify(Path(name))
    options |= {"dtype": DTYPES[dtype], "output_loading_info": True}
    try:
        if is_ours(name):
            model, report = GPTForCausalLM.from_pretrained(name, **options)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except (*UNREADABLE, ImportError) as error:
        why = why_unreadable(error)
        if "Unrecognized configuration class" in why:
            why = "it is not a causal language model (none of transformers' AutoModelForCausalLM)"
        where = (
            "cannot be loaded" if Path(name).exists() else "is not a local directory, and cannot be loaded from the Hub"
        )
        raise UserError(f"model {name!r} {where}: {why}") from error
    refuse_incomplete_weights(name, report)
    check_special_tokens(name, model.generation_config)
    return without_further_heads(name, model)


def without_further_heads(name: str, model):
    """The model, if it is ours without its heads for tokens after the next: nothing but pretraining uses them."""
    if isinstance(model, GPTForCausalLM) and model.mtp is not None:
        log_once(f"{name}: num_nextn_predict_layers={len(model.mtp)}: these heads are for pretraining; dropped")
        model.mtp, model.config.num_nextn_predict_layers = None, 0
    return model


def check_special_tokens(name: str, generation) -> None:
    """Refuse special tokens that are no ids; an empty list, and ids below 0, mean that no token ends a text."""
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(generation, field)
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(type(token) is int for token in ids):
            raise UserError(f"model {name!r}: generation_config.json: {field}={given!r}: must be ids of tokens")
        if field == "eos_token_id" and min(ids, default=-1) < 0:
            generation.eos_token_id = [token for token in ids if token >= 0] or None


def refuse_emulated_dtype(dtype: str, device_type: str) -> None:
    """Refuse to load weights in what the device only emulates; `auto` is for `in_native_dtype`."""
    if isinstance(DTYPES.get(dtype), torch.dtype):
        mend = "take --dtype float32, or override with --force_precision"
        refuse_emulated(f"dtype={dtype}", device_type, DTYPES[dtype], mend)


def add_loading_flags(add) -> None:
    """The flags that say how a model is loaded to be used; `add` is a parser's add_argument."""
    dtypes = "float32, bfloat16, float16 or auto (as saved, unless the device only emulates that)"
    add("--dtype", default="auto", help=dtypes)
    add("--force_precision", action="store_true", help="use a type even if the device only emulates it")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")


def loading_options(flags) -> dict:
    """`load_model_and_tokenizer`'s arguments from those flags; refuses a type that the device only emulates."""
    if not flags.force_precision:
        refuse_emulated_dtype(flags.dtype, best_device().type)
    return {name: getattr(flags, name) for name in ("dtype", "trust_remote_code", "force_precision")}


def without_adapter(model):
    """The model itself, or of an adapter the base that it is on, with the adapter's layers in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def in_native_dtype(model, device_type: str):
    """`model` as it was saved, or in float32 where the device only emulates what it was saved in."""
    is_kept = getattr(model, "is_quantized", False) or is_native(device_type, model.dtype)
    return model if is_kept else model.float()


def load_config(name: str, trust_remote_code: bool = False):
    """The configuration of a model directory or Hub id; what is neither is refused."""
    try:
        if is_ours(name):
            config = GPTConfig.from_pretrained(name)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        why = f"is not a local model directory, and cannot be loaded from the Hub: {one_line(error)}"
        raise UserError(f"model {name!r}: {why}") from error
    if not isinstance(getattr(text_config(config), "vocab_size", None), int):
        why = f"is not a causal language model: its {type(config).__name__} has no vocabulary"
        raise UserError(f"model {name!r}: {why}")
    return config


def load_model_tokenizer(name: str, config, needs_end_of_text: bool = True):
    """The tokenizer of a model with this configuration; entries that the model does not have are refused.

    One of an Acorn model adds nothing to a text, as pretraining does not.
    """
    tokenizer = load_tokenizer(name, needs_end_of_text)
    size = text_config(config).vocab_size
    if len(tokenizer) > size:
        sizes = f"the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {size}"
        raise UserError(f"{name}: {sizes}: they do not belong together")
    return add_nothing(tokenizer) if config.model_type in OUR_TYPES else tokenizer


def load_model_and_tokenizer(
    name: str, dtype: str = "auto", trust_remote_code: bool = False, force_precision: bool = False
):
    """(model in eval mode on the best device, tokenizer); an adapter's directory gives its base with it on top.

    dtype: `auto` is what was saved, or float32 where the device only emulates that and `force_precision` is not set.
    """
    load, device = load_adapter if is_adapter(name) else load_causal_lm, best_device()
    model = load(str(name), dtype, trust_remote_code)
    tokenizer = load_model_tokenizer(tokenizer_home(str(name)), model.config, needs_end_of_text=False)
    if dtype == "auto" and not force_precision:
        model = in_native_dtype(model, device.type)
    return model.to(device).eval(), tokenizer


def refuse_incomplete_weights(name: str, report: dict) -> None:
    """Refuse weights that are not the model's: from_pretrained would start the missing ones at random."""
    for kind, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        keys = sorted(key if isinstance(key, str) else key[0] for key in report.get(kind) or ())
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(f"model {name!r}: its file of weights {what} {', '.join(keys[:3])}{more}; get a whole copy")


def refuse_missing_directory(name: str) -> None:
    """Refuse a path where nothing is; a Hub id is NAME or OWNER/NAME, and OWNER is no directory here."""
    path = Path(name)
    is_path = name.startswith((".", "/", "~")) or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        raise UserError(f"model {name!r}: there is no such directory")


def is_ours(name: str) -> bool:
    """Whether `name` is a directory that holds a GPT of this project; refuses a directory without a model."""
    directory = Path(name)
    refuse_missing_directory(name)
    if not directory.is_dir():
        return False
    if not (directory / "config.json").is_file():
        holds = "it has checkpoints, but" if list(directory.glob("checkpoint-*")) else "there is"
        raise UserError(f"model {directory}: {holds} no config.json in it; name a run directory or a checkpoint")
    return read_json(directory / "config.json").get("model_type") in OUR_TYPES


# ---- adapters


def is_adapter(name: str) -> bool:
    """Whether `name` is a directory that holds a PEFT adapter."""
    return (Path(name) / ADAPTER_CONFIG).is_file()


def load_adapter(directory: str, dtype: str = "auto", trust_remote_code: bool = False):
    """The adapter in `directory` on its base, as a PeftModel; refuses a base that is gone or another."""
    from peft import PeftModel  # half a second that plain models need not wait for

    verify(Path(directory))
    base_name = base_of(Path(directory))
    try:
        base = load_causal_lm(base_name, dtype, trust_remote_code)
    except UserError as error:
        raise UserError(f"adapter {directory}: its base is gone or damaged: {error}") from error
    known, found = recorded_fingerprint(Path(directory)), fingerprint(base)
    if known not in (None, found):
        raise UserError(
            f"adapter {directory}: {base_name} is not the base it was trained on "
            f"(fingerprint {found[:8]}, not {known[:8]}); put the old base back"
        )
    try:
        with without_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would stay as they begin
            resize_for_tokens(base, Path(directory))
            return with_cache_names(PeftModel.from_pretrained(base, directory))
    except (*UNREADABLE, UserWarning) as error:
        why = why_unreadable(error)
        raise UserError(f"adapter {directory}: is damaged, or does not fit {base_name}: {why}") from error


def resize_for_tokens(base, directory: Path) -> None:
    """Give the base the rows that an adapter was trained with: for tokens added to its tokenizer, as AutoPeft does.

    The new rows come with the adapter, where PEFT saved its embeddings; a base is never made smaller.
    """
    embedding = base.get_input_embeddings()
    name, rows = next(name for name, module in base.named_modules() if module is embedding), [embedding.weight.shape[0]]
    if (directory / "tokenizer_config.json").is_file():
        rows.append(len(load_tokenizer(str(directory), needs_end_of_text=False)))
    for path in directory.glob("adapter_model.safetensors"):
        with safe_open(path, framework="numpy") as tensors:
            kept = [key for key in tensors.keys() if key.endswith(f".{name}.weight")]  # noqa: SIM118
            rows += [tensors.get_slice(key).get_shape()[0] for key in kept]
    if max(rows) > rows[0]:
        base.resize_token_embeddings(max(rows), mean_resizing=False)


def with_cache_names(adapted):
    """The same PeftModel, whose virtual tokens reach the base, and find the cache, by the cache's new name.

    PEFT 0.21 knows the one of before transformers 5.24 alone; this goes when a later PEFT knows both.
    """
    if CACHE_NAME == "past_key_values" or not adapted.active_peft_config.is_prompt_learning:
        return adapted
    if CACHE_NAME in inspect.signature(adapted.base_model.forward).parameters:
        adapted.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, _renamed(kwargs, "past_key_values", CACHE_NAME)), with_kwargs=True
        )
    base, whole = adapted.base_model_prepare_inputs_for_generation, adapted.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        adapted.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: _renamed(
            base(*args, **kwargs), CACHE_NAME, "past_key_values"
        )
        try:
            return _renamed(whole(*args, **kwargs), "past_key_values", CACHE_NAME)
        finally:
            adapted.base_model_prepare_inputs_for_generation = base

    adapted.prepare_inputs_for_generation = prepare
    return adapted


def _renamed(kwargs: dict, old: str, new: str) -> dict:
    return {new if name == old else name: value for name, value in kwargs.items()}


@contextmanager
def without_warnings() -> Iterator[None]:
    """PEFT warns of what transformers renamed, and of a base that the Hub does not answer for: nobody can mend that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def base_of(directory: Path) -> str:
    """Path or id of an adapter's base; refuses a path where nothing is any more."""
    name = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(
            f"adapter {directory}: {ADAPTER_CONFIG} names no base; name one there as base_model_name_or_path"
        )
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(
            f"adapter {directory}: its base {name} is gone; put it back, or name where it is now as "
            f"base_model_name_or_path in {directory / ADAPTER_CONFIG}"
        )
    return name


def record_base(directory: Path, name: str, known: str | None) -> None:
    """Write which base an adapter belongs to; `known` is the base's fingerprint, None where it could not be taken."""
    (directory / BASE_RECORD).write_text(json.dumps({"name": name, "fingerprint": known}) + "\n", encoding="utf-8")


def recorded_fingerprint(directory: Path) -> str | None:
    """What `record_base` wrote; None for adapters made elsewhere, or on a 4-bit base."""
    record = read_json(directory / BASE_RECORD)
    if record and not isinstance(record.get("fingerprint", 0), str | None):
        raise UserError(f"{directory / BASE_RECORD} is damaged: it has no fingerprint; copy the directory again")
    return record.get("fingerprint")


@torch.no_grad()
def fingerprint(model) -> str:
    """What a base is known by: sha256 of names, shapes and the first numbers of its weights, rounded to bfloat16.

    Rounded, so that a base loaded in half precision is still the same base.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_home(name: str) -> str:
    """Where a model's or an adapter's tokenizer lies: an adapter without one of its own has its base's."""
    has_own = (Path(name) / "tokenizer_config.json").is_file()
    return base_of(Path(name)) if is_adapter(name) and not has_own else name
