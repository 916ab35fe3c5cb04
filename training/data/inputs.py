"""What a run is grown from, by fingerprints: recorded as it begins, and the same again whenever it goes on."""

import json
from pathlib import Path

from ..system.errors import UserError
from ..system.files import digest, read_json, write_json
from .sources import fingerprint_sources
from .tokenizers import BUILDERS, load_tokenizer, tokenizer_hash

INPUTS = "inputs.json"
Inputs = dict[str, str | None]  # what, in words: its fingerprint; None where it cannot be taken


def text_digest(sources: dict) -> str | None:
    """The fingerprint of sources by what they hold, wherever their files lie; None where the Hub gave no revision."""

    def contents(part):
        if isinstance(part, dict):
            return {key: contents(value) for key, value in part.items() if key not in ("path", "python")}
        return [contents(entry) for entry in part] if isinstance(part, list) else part

    text = json.dumps(contents(sources), sort_keys=True)
    return None if '"revision": null' in text else digest(text.encode())


def split_digest(data) -> str:
    """The fingerprint of the rule that says which text validates."""
    return digest({"by": data.validation_by, "fraction": data.validation_fraction, "seed": data.validation_seed})


def inputs_named_by(data) -> Inputs:
    """What can be known of the inputs before the text is prepared (again)."""
    inputs: Inputs = {"the text": text_digest(fingerprint_sources(data)), "the validation split": split_digest(data)}
    if data.tokenizer not in BUILDERS:
        inputs["the tokenizer"] = tokenizer_hash(load_tokenizer(data.tokenizer))
    return inputs


def record_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Write what the run is grown from, whole."""
    write_json(run_dir / INPUTS, inputs)


def refuse_other_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Refuse to go on with anything else than the run began with; runs of an Acorn that recorded nothing are taken."""
    recorded = read_json(run_dir / INPUTS, "copy it from a backup")
    changed = [what for what, now in inputs.items() if now and recorded.get(what) and now != recorded[what]]
    if changed:
        raise UserError(
            f"{run_dir}: {', '.join(changed)} changed since the run began: restore what it was, or start a new "
            "run with another --output_dir"
        )
