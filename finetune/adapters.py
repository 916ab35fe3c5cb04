"""The table of adapters: a name, PEFT's configuration for it, and what is adapted in each architecture."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.optimizers import create_loraplus_optimizer
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from training.model.devices import DTYPES
from training.model.loading import with_cache_names, without_warnings
from training.system.errors import UserError, one_line

LINEAR = nn.Linear | Conv1D
# (names of what is adapted, those of them that are the MLP's) for IA3: keys, values and the MLP's second layer.
IA3_NAMES = (
    (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    (["k_proj", "v_proj", "fc2"], ["fc2"]),
    (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    (["c_attn", "c_proj"], ["c_proj"]),
)


@dataclass(frozen=True)
class Adapter:
    """One row of the table.

    config: (AdapterArguments, model) to PEFT's configuration, or None where the whole model is trained. options: the
    settings that it reads. learning_rate: where a recipe or flag gives none.
    """

    about: str
    config: Callable[[object, nn.Module], PeftConfig] | None
    options: tuple[str, ...]
    learning_rate: float


# ---- what there is to adapt


def linear_layers(model: nn.Module) -> list[str]:
    """The full names of the linear layers in the repeated blocks (GPT-2's Conv1D is one); the head is in no block."""
    layers = [name for name, module in model.named_modules() if isinstance(module, LINEAR)]
    return [name for name in layers if any(part.isdigit() for part in name.split("."))]


def leaf(name: str) -> str:
    """The last word of a module's name, with the word before it where the last is a number."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def matches(wanted: str, module: str) -> bool:
    """Whether a wanted name is that of a module, as PEFT reads it: the whole of it or its end."""
    return module == wanted or module.endswith(f".{wanted}")


def refuse_unmatched(field: str, wanted: list[str], model: nn.Module, kinds=nn.Module) -> None:
    """Raise a UserError that lists what there is, where a name matches no module of these kinds."""
    known = [name for name, module in model.named_modules() if name and isinstance(module, kinds)]
    for name in wanted:
        if not any(matches(name, module) for module in known):
            raise UserError(
                f"{field}={name!r}: matches nothing in this model; there are {', '.join(sorted(set(map(leaf, known))))}"
            )


def tied_pair(model: nn.Module) -> tuple[str, ...]:
    """The names of the head and of the embedding where the two are one tensor, and nothing where they are not."""
    pair = model.get_output_embeddings(), model.get_input_embeddings()
    if None in pair or pair[0].weight is not pair[1].weight:
        return ()
    known = {id(module): name for name, module in model.named_modules()}
    return tuple(known[id(module)] for module in pair)


def find_targets(wanted: list[str] | None, model: nn.Module) -> list[str]:
    """The modules to adapt: those wanted, or every linear layer of the blocks.

    Refused are names that match nothing, and one of a tied pair: the adapter would change that one and not the other.
    """
    if wanted is None:
        if not (found := sorted(set(map(leaf, linear_layers(model))))):
            raise UserError("target_modules: the model has no linear layers in blocks; name some, or take adapter=full")
        return found
    refuse_unmatched("target_modules", wanted, model, LINEAR | nn.Embedding)
    pair = tied_pair(model)
    for target in wanted:
        if any(matches(target, name) for name in pair):
            raise UserError(
                f"target_modules={target!r}: {' and '.join(pair)} are one tensor, and an adapter on one leaves the "
                f"other as it was; leave it out, or train them whole (adapter=lora, --modules_to_save {leaf(pair[0])})"
            )
    return wanted


# ---- PEFT's configurations


def lora(arguments, model: nn.Module, **variant) -> LoraConfig:
    """Low-rank updates of linear layers (arXiv 2106.09685); `variant` is what rsLoRA, DoRA and PiSSA switch on."""
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=arguments.r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=find_targets(arguments.target_modules, model),
        fan_in_fan_out=has_conv1d(model),
        **trained_whole(arguments, model),
        **variant,
    )


def has_conv1d(model: nn.Module) -> bool:
    return any(isinstance(module, Conv1D) for module in model.modules())


def trained_whole(arguments, model: nn.Module) -> dict:
    """PEFT's arguments for modules that are trained beside the adapter; either name of a tied pair trains the pair."""
    wanted, pair = arguments.modules_to_save or [], tied_pair(model)
    refuse_unmatched("modules_to_save", wanted, model)
    both = " and ".join(pair)
    for name in wanted:
        around = tuple(f"{module}." for module, _ in model.named_modules() if module and matches(name, module))
        if any(of_pair.startswith(around) for of_pair in pair):
            raise UserError(f"modules_to_save={name!r}: holds one of {both}, which are one tensor; name parts of it")
    tied = [name for name in wanted if any(matches(name, of_pair) for of_pair in pair)]
    if not tied:
        return {"modules_to_save": wanted} if wanted else {}
    known = [name for name in map(leaf, pair) if name in EMBEDDING_LAYER_NAMES]
    if arguments.adapter == "ia3" or not known:
        who = "ia3" if arguments.adapter == "ia3" else "PEFT, for such names,"
        raise UserError(
            f"modules_to_save={tied[0]!r}: {both} are one tensor, and {who} cannot train them as one; "
            "take adapter=full, or lora on a model that names them embed_tokens and lm_head"
        )
    return {"modules_to_save": [*(name for name in wanted if name not in tied), known[0]], "ensure_weight_tying": True}


def ia3(arguments, model: nn.Module) -> IA3Config:
    """Learned factors on keys, values and the MLP's hidden layer (arXiv 2205.05638)."""
    targets, feedforward = arguments.target_modules, arguments.feedforward_modules or []
    if targets is None:
        layers = linear_layers(model)
        fitting = [row for row in IA3_NAMES if all(any(matches(name, layer) for layer in layers) for name in row[0])]
        if not fitting:
            raise UserError(
                "target_modules: name the keys, the values and the MLP's second layer, the last of them as "
                f"--feedforward_modules too; there are {', '.join(sorted(set(map(leaf, layers))))}"
            )
        targets, feedforward = fitting[0]
    find_targets(targets, model)
    if not set(feedforward) <= set(targets):
        raise UserError(f"feedforward_modules={feedforward}: each must be among target_modules={targets}")
    return IA3Config(
        task_type=TaskType.CAUSAL_LM,
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=has_conv1d(model),
        **trained_whole(arguments, model),
    )


def prompt(arguments, model: nn.Module) -> PromptTuningConfig:
    """Trained embeddings in front of the text (arXiv 2104.08691), started from the vocabulary or from a text."""
    tables = [name for name in ("bigram_vocab_size", "value_embeddings") if getattr(model.config, name, None)]
    if tables:
        raise UserError(f"adapter=prompt: its virtual tokens are none that {tables[0]} looks up; choose lora")
    text = arguments.prompt_tuning_init_text or None
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=arguments.num_virtual_tokens,
        prompt_tuning_init="TEXT" if text else "SAMPLE_VOCAB",
        prompt_tuning_init_text=text,
        tokenizer_name_or_path=model.config.name_or_path if text else None,
    )


def prefix(arguments, model: nn.Module) -> PrefixTuningConfig:
    """Trained keys and values in front of every layer's (arXiv 2101.00190), in a plain cache."""
    config = model.config
    for field in ("kv_quantization", "memory_length"):
        if value := getattr(config, field, None):
            why = "needs a cache of its own kind, which takes no trained keys and values"
            raise UserError(f"adapter=prefix: {field}={value!r} {why}; choose prompt or lora")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    latents = ["latents (kv_lora_rank)"] if getattr(config, "kv_lora_rank", None) else []
    shared = ["shared ones"] if any(getattr(config, "kv_sharing_modes", None) or ()) else []
    if others or latents or shared:
        raise UserError(
            "adapter=prefix: it needs keys and values of its own in every layer, and this model has "
            f"{', '.join([*sorted(others), *latents, *shared])}; choose prompt or lora"
        )
    return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=arguments.num_virtual_tokens)


LORA_OPTIONS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
ADAPTERS = {
    "full": Adapter("no adapter: every weight is trained", None, (), 5e-5),
    "lora": Adapter("low-rank updates", lora, LORA_OPTIONS, 2e-4),
    "rslora": Adapter("LoRA scaled by lora_alpha / sqrt(r)", partial(lora, use_rslora=True), LORA_OPTIONS, 2e-4),
    "dora": Adapter("LoRA of directions, and magnitudes", partial(lora, use_dora=True), LORA_OPTIONS, 2e-4),
    "pissa": Adapter("LoRA from the largest components", partial(lora, init_lora_weights="pissa"), LORA_OPTIONS, 5e-5),
    "loraplus": Adapter("LoRA with a higher learning rate of B", lora, (*LORA_OPTIONS, "loraplus_lr_ratio"), 5e-5),
    "qlora": Adapter("LoRA on a 4-bit base", lora, LORA_OPTIONS, 2e-4),
    "ia3": Adapter("learned scales", ia3, ("target_modules", "feedforward_modules", "modules_to_save"), 5e-3),
    "prompt": Adapter("trained virtual tokens", prompt, ("num_virtual_tokens", "prompt_tuning_init_text"), 1e-2),
    "prefix": Adapter("trained virtual keys and values", prefix, ("num_virtual_tokens",), 1e-2),
}


# ---- the base, and the adapter on it


def quantization(name: str, precision: str) -> dict:
    """What from_pretrained needs beside the usual for this adapter: 4-bit weights for qlora (arXiv 2305.14314)."""
    if name != "qlora":
        return {}
    if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("adapter=qlora: needs a CUDA GPU and bitsandbytes (pip install bitsandbytes); use adapter=lora")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device()}}


def attach(model: nn.Module, arguments, base_name: str) -> nn.Module:
    """The model with the adapter that `arguments` (AdapterArguments) name; as it is for `full`."""
    adapter = ADAPTERS[arguments.adapter]
    if adapter.config is None:
        return model
    if arguments.adapter == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    try:
        with without_warnings():
            adapted = get_peft_model(model, adapter.config(arguments, model))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"adapter={arguments.adapter}: does not fit this model: {one_line(error)}") from error
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return with_cache_names(adapted)


def virtual_tokens(arguments) -> int:
    """Tokens of the context that the adapter takes for itself."""
    return arguments.num_virtual_tokens if arguments.adapter in ("prompt", "prefix") else 0


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; the base's alone where there is no adapter, and 4-bit ones at their true number."""
    if hasattr(model, "get_nb_trainable_parameters"):
        return model.get_nb_trainable_parameters()
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def build_loraplus(model: nn.Module, args, ratio: float) -> torch.optim.Optimizer:
    """AdamW in PEFT's groups, where every B learns `ratio` times as fast as its A (arXiv 2402.12354)."""
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=args.learning_rate,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
