"""A model (or an adapter on its base) and its tokenizer from a run, a checkpoint, a model directory or a Hub id."""

import torch

from training.errors import UserError
from training.loading import is_adapter, load_adapter, load_causal_lm, tokenizer_home
from training.tokenizers import load_tokenizer


def load_model_and_tokenizer(name: str, dtype: str = "auto", trust_remote_code: bool = False):
    """(model in eval mode on the best device, tokenizer); a mismatch of the two is refused.

    Our own architecture is loaded from the installed code; code that a directory or a Hub id brings runs only with
    `trust_remote_code`. An adapter's directory gives its base with the adapter on it.
    """
    load = load_adapter if is_adapter(name) else load_causal_lm
    model = load(str(name), dtype, trust_remote_code)
    tokenizer = load_tokenizer(tokenizer_home(str(name)), needs_end_of_text=False)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} entries, the model's vocab_size is {model.config.vocab_size}: "
            "they do not belong together"
        )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval(), tokenizer
