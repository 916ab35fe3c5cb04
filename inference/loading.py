"""A model and its tokenizer from a run directory, a checkpoint, a model directory or a Hub id."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from modeling import GPTForCausalLM
from training.errors import UserError, one_line, unknown
from training.tokenizers import load_tokenizer

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model_and_tokenizer(name: str, dtype: str = "auto", trust_remote_code: bool = False):
    """(model in eval mode on the best device, tokenizer); a mismatch of the two is refused.

    Our own architecture is loaded from the installed code; code that a directory or a Hub id brings runs only with
    `trust_remote_code`.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    path = Path(name)
    is_ours = path.is_dir() and own_model_type(path)
    loader = GPTForCausalLM if is_ours else AutoModelForCausalLM
    options = {} if is_ours else {"trust_remote_code": trust_remote_code}
    try:
        model = loader.from_pretrained(name, dtype=DTYPES[dtype], **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
    tokenizer = load_tokenizer(str(name))
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {model.config.vocab_size}: "
            "they do not belong together"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def own_model_type(directory: Path) -> bool:
    """Whether the directory holds a GPT of this project; refuses a directory without a model."""
    if not (directory / "config.json").is_file():
        holds = "it has checkpoints, but" if list(directory.glob("checkpoint-*")) else ""
        raise UserError(
            f"model {directory}: {holds or 'there is'} no config.json in it; name a run directory or a checkpoint"
        )
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8")).get("model_type") == "gpt"
    except ValueError as error:
        raise UserError(f"model {directory}: config.json is damaged ({error}); copy the directory again") from error
