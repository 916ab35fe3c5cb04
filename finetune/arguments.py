"""What a finetuning recipe and its flags fill: the sections of training's recipes, and one for the adapter."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

from training.config.arguments import DataArguments, GPTTrainingArguments, SampleArguments, help_field
from training.config.choices import check_attention
from training.config.recipe import SECTIONS, Recipe, load_recipe_file, parse_flags, shipped_recipes
from training.data.tokenizers import BUILDERS
from training.model.loading import DTYPES
from training.system.addresses import public_name
from training.system.errors import UserError, unknown
from training.system.shell import shell

from .adapters import ADAPTERS


@dataclass
class ModelArguments:
    """Which model is finetuned, and how it is loaded."""

    model_name_or_path: str | None = help_field("Any causal LM: a Hub id, a model directory or an Acorn run.")
    dtype: str = help_field("Of the weights that are loaded: float32, bfloat16, float16 or auto (as saved).", "float32")
    attn_implementation: str | None = help_field("sdpa, eager, flash_attention_2 … (default: the model's choice).")
    trust_remote_code: bool = help_field("Run model code that a Hub id brings.", False)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        check_attention(self.attn_implementation)


@dataclass
class FinetuneDataArguments(DataArguments):
    """Where the text, the pairs or the conversations come from, and how they become rows."""

    data_format: str = help_field("auto (what it is, it finds out), text, pairs or chat.", "auto")
    prompt_column: str = help_field(
        "Pairs: the column of what is given (instruction and input, or question, are known too).", "prompt"
    )
    completion_column: str = help_field(
        "Pairs: the column of what is learned (output, response and answer are known too).", "completion"
    )
    messages_column: str | None = help_field("Chat: the column of messages (default: messages or conversations).")
    block_size: int | None = help_field("Tokens a row (default: the model's context, at most 1024).")
    packing: bool = help_field("Several documents in a row, which do not see each other; false: one a row.", True)
    tokenizer: str | None = help_field("Another tokenizer than the model's, by id or path; it must fit the model.")

    def __post_init__(self):
        super().__post_init__()
        if self.tokenizer_vocab_size is not None:
            raise UserError("tokenizer_vocab_size: finetuning keeps the model's tokenizer; leave it out")
        if self.tokenizer in BUILDERS:
            raise UserError(f"tokenizer={self.tokenizer!r}: finetuning keeps the model's tokenizer; leave it out")
        if self.streaming:
            raise UserError("streaming: finetuning reads its data before it begins; leave it out")


@dataclass
class FinetuneTrainingArguments(GPTTrainingArguments):
    """Training's arguments with defaults for little text and a model that knows much already."""

    learning_rate: float = help_field("Peak learning rate (default: the adapter's own).", 2e-4)
    per_device_train_batch_size: int = help_field("Rows a micro-batch and process.", 4)
    per_device_eval_batch_size: int = help_field("Rows an evaluation batch and process.", 8)
    num_train_epochs: float = help_field("Passes over the text when max_steps is -1.", 3.0)
    warmup_steps: float = help_field("Steps (or, below one, the share of steps) of linear warm-up.", 0.05)
    weight_decay: float = help_field("Decay of trained matrices.", 0.0)
    adam_beta2: float = help_field("AdamW's second beta.", 0.999)
    eval_steps: float | None = help_field("Steps (or, below one, the share of steps) between evaluations.", 0.1)
    eval_on_start: bool = help_field("Evaluate before the first step: the `before` of the report.", True)


@dataclass
class FinetuneSampleArguments(SampleArguments):
    """What is written before and after finetuning, side by side."""

    prompt: str | None = help_field(
        "Text to continue, or a user's message in a chat (default: from the held-out data)."
    )
    max_new_tokens: int = help_field("Length of the sample in tokens; 0 writes none.", 100)


@dataclass
class AdapterArguments:
    """Which adapter, and its settings under PEFT's names."""

    adapter: str = help_field(f"One of {', '.join(ADAPTERS)}.", "lora")
    r: int = help_field("LoRA: rank.", 16)
    lora_alpha: float = help_field("LoRA: the update is scaled by lora_alpha / r.", 32)
    lora_dropout: float = help_field("LoRA: dropout before the adapter.", 0.0)
    target_modules: list[str] | None = help_field("Modules to adapt (default: every linear layer of the blocks).")
    feedforward_modules: list[str] | None = help_field("IA3: which of them are of the MLP.")
    modules_to_save: list[str] | None = help_field("Modules trained whole beside the adapter, such as lm_head.")
    loraplus_lr_ratio: float = help_field("LoRA+: learning rate of B over that of A.", 16.0)
    num_virtual_tokens: int = help_field("Prompt and prefix tuning: virtual tokens.", 20)
    prompt_tuning_init_text: str | None = help_field(
        "Prompt tuning: text whose embeddings the virtual tokens start from."
    )

    def __post_init__(self):
        if self.adapter not in ADAPTERS:
            raise unknown("adapter", self.adapter, ADAPTERS)


@dataclass
class FinetuneRecipe(Recipe):
    """A recipe of `acorn finetune`."""

    adapter: dict = field(default_factory=dict)

    directory: typing.ClassVar[Path] = Path(__file__).parent / "recipes"
    sections: typing.ClassVar[dict[str, type]] = {
        **SECTIONS,
        "model": ModelArguments,
        "data": FinetuneDataArguments,
        "training": FinetuneTrainingArguments,
        "sample": FinetuneSampleArguments,
        "adapter": AdapterArguments,
    }

    def model_arguments(self) -> ModelArguments:
        arguments = ModelArguments(**self.model)
        if not arguments.model_name_or_path:
            raise UserError("model_name_or_path: which model? give --model_name_or_path, a Hub id or a path")
        return arguments

    def adapter_arguments(self) -> AdapterArguments:
        return AdapterArguments(**self.adapter)

    def training_arguments(self) -> FinetuneTrainingArguments:
        self.training.setdefault("learning_rate", ADAPTERS[self.adapter_arguments().adapter].learning_rate)
        return super().training_arguments()


def load_finetune_recipe(argv: list[str]) -> FinetuneRecipe:
    """The recipe that RECIPE-OR-MODEL names, with flags laid over; a model's id or path is a recipe of defaults."""
    if not argv or argv[0].startswith("-"):
        names = ", ".join(shipped_recipes(FinetuneRecipe))
        raise UserError(f"acorn finetune needs a RECIPE ({names}, or a YAML file) or a MODEL (a Hub id or a directory)")
    name, flags = argv[0], parse_flags(argv[1:], FinetuneRecipe)
    if name in shipped_recipes(FinetuneRecipe) or name.endswith((".yaml", ".yml")):
        recipe = load_recipe_file(name, FinetuneRecipe)
    else:
        adapter = flags.get("adapter", {}).get("adapter", AdapterArguments.adapter)
        recipe = FinetuneRecipe(name=f"{Path(name).name}-{adapter}", model={"model_name_or_path": name})
    recipe.update(flags)
    recipe.check()
    recipe.command = shell("acorn", "finetune", *map(public_name, argv))
    fit_adapter(recipe, flags.get("adapter", {}))
    return recipe


def fit_adapter(recipe: FinetuneRecipe, flags: dict) -> None:
    """Drop the recipe's settings of another adapter than the one chosen; refuse flags that it would not read."""
    chosen = recipe.adapter_arguments().adapter
    known = ("adapter", *ADAPTERS[chosen].options)
    for name in flags:
        if name not in known:
            takes = f"it takes {', '.join(known[1:])}" if known[1:] else "it takes no settings"
            raise UserError(f"--{name}: adapter={chosen} does not read it; {takes}")
    recipe.adapter = {name: value for name, value in recipe.adapter.items() if name in known}


def argument_fields(kind: type) -> list[str]:
    """The names of a section's keys."""
    return [f.name for f in dataclasses.fields(kind)]
