"""A run that starts from another model's weights: what it takes over of its architecture, and what may be another."""

from contextlib import suppress
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from modeling import GPTConfig, GPTForCausalLM
from modeling.configuration_gpt import FIELDS

from ..system.errors import UserError, one_line
from ..system.pickles import UNREADABLE
from ..system.run_files import verify
from .loading import OUR_TYPES, is_adapter, refuse_missing_directory

# What GPTConfig derives where it is not said, in the order in which it does.
DERIVED = ("num_key_value_heads", "head_dim", "intermediate_size", "layer_types", "rope_parameters")
OF_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")
KNOW_CONTEXT = ("yarn", "llama3")  # kinds of rotary positions that must know which context they stretch


def config_to_start_from(name: str) -> GPTConfig:
    """The configuration of a model of this project; anything else is refused, with how it becomes one."""
    refuse_missing_directory(name)
    if is_adapter(name):
        raise UserError(f"model_name_or_path={name!r}: is an adapter; make it a model first, with `acorn merge`")
    try:
        saved, _ = GPTConfig.get_config_dict(name)
        if saved.get("model_type") in OUR_TYPES:
            return GPTConfig.from_pretrained(name)
    except UNREADABLE as error:
        raise UserError(f"model_name_or_path={name!r}: cannot be read: {one_line(error)}") from error
    kind = saved.get("model_type", "another kind")
    raise UserError(
        f"model_name_or_path={name!r}: holds a model of {kind}; convert it first (`acorn convert --help`), or "
        "finetune it as it is (`acorn finetune`)"
    )


def architecture_to_start_from(name: str, changes: dict) -> dict:
    """The keys of a recipe's model section for the model in `name` with `changes` of its architecture.

    As few keys as say it, so that what follows from a changed one follows still. Of a stretched rotary embedding what
    is not said comes from the model: `rope_theta`, and the context that it was trained with.
    """
    trained = config_to_start_from(name)
    refuse_context(name, trained, changes.get("max_position_embeddings", trained.max_position_embeddings))
    keys = least_keys(trained)
    if changes.get("rope_parameters"):
        changes = changes | {"rope_parameters": stretched(name, trained, changes["rope_parameters"])}
    return keys | changes


def refuse_context(name: str, trained: GPTConfig, context: int) -> None:
    """Refuse a context that the trained model's positions cannot have, or that is shorter than what it has learned."""
    has = trained.max_position_embeddings
    if context < has:
        raise UserError(
            f"block_size={context}: {name} was trained with a context of {has}; give {has} or more, or leave it out"
        )
    if context > has and trained.position_encoding == "learned":
        raise UserError(
            f"block_size={context}: learned positions are fixed at {has} in {name}; "
            "only rope, sinusoidal and none can be extended"
        )


def least_keys(config: GPTConfig) -> dict:
    """The fields of a configuration that differ from GPTConfig's defaults and follow from no other field."""
    names = [name for name in FIELDS if name not in OF_TOKENIZER]
    keys = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(GPTConfig, name)}
    keys["vocab_size"] = config.vocab_size  # or else it would be the tokenizer's
    for name in DERIVED:
        without = {key: value for key, value in keys.items() if key != name}
        with suppress(StrictDataclassError):  # such as a head_dim that does not follow from anything
            keys = without if name in keys and getattr(GPTConfig(**without), name) == keys[name] else keys
    return keys


def stretched(name: str, trained: GPTConfig, parameters: dict) -> dict:
    """Rotary parameters with what the trained model knows of them filled in; refuses what would not be read."""
    if trained.position_encoding != "rope":
        raise UserError(f"rope_parameters: the positions of {name} are {trained.position_encoding}; leave it out")
    if trained.rope_layer_types():
        return parameters  # of each kind of layer: there all is said
    usual = {"rope_theta": trained.rope_parameters["rope_theta"]}
    if parameters.get("rope_type") in KNOW_CONTEXT:
        usual["original_max_position_embeddings"] = trained.max_position_embeddings
    return usual | parameters


BEGIN_AT_ZERO = "_quantizer.bias"  # weights that a model which was trained without kv_quantization need not have


def model_to_start_from(name: str, config: GPTConfig) -> GPTForCausalLM:
    """The weights of `name` in a model of this configuration, in float32; weights that do not fit it are refused."""
    verify(Path(name))
    config = GPTConfig.from_dict(config.to_dict())  # from_pretrained writes into it
    try:
        model, report = GPTForCausalLM.from_pretrained(
            name, config=config, dtype="float32", ignore_mismatched_sizes=True, output_loading_info=True
        )
    except UNREADABLE as error:
        raise UserError(f"model_name_or_path={name!r}: cannot be loaded: {one_line(error)}") from error
    kinds = {
        "mismatched_keys": "another shape of",
        "missing_keys": "no",
        "unexpected_keys": "more than the model asks:",
    }
    for kind, what in kinds.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in report.get(kind) or ())
        keys = [key for key in keys if not (kind == "missing_keys" and key.endswith(BEGIN_AT_ZERO))]
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UserError(
                f"model_name_or_path={name!r}: its weights have {what} {', '.join(keys[:3])}{more}; "
                "leave out what changes the shape of the model"
            )
    return model
