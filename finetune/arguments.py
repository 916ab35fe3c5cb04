"""What a finetuning recipe and its flags fill: the sections of training's recipes, and one for the adapter."""

import argparse
import typing
from dataclasses import dataclass, field
from pathlib import Path

from training.config.arguments import DataArguments, GPTTrainingArguments, SampleArguments, help_field
from training.config.command_line import given_values, recipe_parser
from training.config.recipe import SECTIONS, Recipe, load_recipe_file, shipped_recipes
from training.data.dataset import LANES
from training.data.tokenizers import BUILDERS
from training.system.addresses import public_name
from training.system.errors import UserError, unknown
from training.system.shell import shell

from .adapters import ADAPTERS

EXAMPLES = """  acorn finetune gpt2 --text_files my.txt
  acorn finetune gpt2-lora-chat --text_files chat.txt --preview      one example, token by token
  acorn finetune runs/quickstart --data_files pairs.jsonl --adapter dora --r 8
  acorn resume runs/gpt2-lora --max_steps 500                        continue a run
  accelerate launch -m finetune.finetune gpt2-full-text"""
NO_MEMORY = "finetuning reads documents by themselves, without a memory; leave it out"
KEEPS = "finetuning keeps the model's tokenizer; leave it out"


@dataclass
class ModelArguments:
    """Which model is finetuned, and how it is loaded."""

    model_name_or_path: str | None = help_field("Causal language model: a Hub id, model directory or Acorn run.")
    dtype: str = help_field("Type of the loaded weights: float32, bfloat16, float16 or auto (as saved).", "float32")
    attn_implementation: str | None = help_field("Attention kernel: sdpa, eager, flash_attention_2, ...")
    trust_remote_code: bool = help_field("Run model code from the Hub.", False)


@dataclass
class FinetuneDataArguments(DataArguments):
    """Where the text, the pairs or the conversations come from, and how they become rows."""

    dataset: str | None = help_field("Dataset on the Hub, local dataset directory, python-stdlib or synthetic-chat.")
    data_format: str = help_field("Format of the data: auto (detected), text, pairs or chat.", "auto")
    prompt_column: str = help_field("Pairs: column of the prompt; instruction, question, ... are known, too.", "prompt")
    completion_column: str = help_field(
        "Pairs: column of the completion; output, response, ... are known, too.", "completion"
    )
    messages_column: str | None = help_field("Chat: column of the messages (default: messages or conversations).")
    block_size: int | None = help_field("Tokens per row (default: the model's context, at most 1024).")
    packing: bool = help_field("Pack several documents into one row, without attention between them.", True)
    tokenizer: str | None = help_field("Hub id or path of another tokenizer that fits the model.")

    def __post_init__(self):
        if self.tokenizer in BUILDERS:
            raise UserError(f"tokenizer={self.tokenizer!r}: {KEEPS}")
        if self.sampling == LANES:
            raise UserError(f"sampling={LANES!r}: {NO_MEMORY}")
        if self.document_masking:
            raise UserError("document_masking=True: in finetuning packing keeps documents apart; leave it out")


@dataclass
class FinetuneTrainingArguments(GPTTrainingArguments):
    """Training's arguments with defaults for little text and a model that knows much already."""

    learning_rate: float = help_field("Peak learning rate; each adapter has a default of its own.", 2e-4)
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 8
    num_train_epochs: float = 3.0
    warmup_steps: float = 0.05
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    eval_steps: float | None = 0.1
    eval_on_start: bool = True  # the `before` of the report


@dataclass
class FinetuneSampleArguments(SampleArguments):
    """The text generated before and after finetuning, side by side."""

    prompt: str | None = help_field("Text to continue, or a user's message (default: from the held-out data).")
    max_new_tokens: int = 100


@dataclass
class AdapterArguments:
    """Which adapter, and its settings under PEFT's names."""

    adapter: str = help_field(f"Adapter: {', '.join(ADAPTERS)}.", "lora")
    r: int = help_field("LoRA: rank.", 16)
    lora_alpha: float = help_field("LoRA: the update is scaled by lora_alpha / r.", 32)
    lora_dropout: float = help_field("LoRA: dropout before the adapter.", 0.0)
    target_modules: list[str] | None = help_field("Modules to adapt (default: every linear layer of the blocks).")
    feedforward_modules: list[str] | None = help_field("IA3: the target modules that belong to the MLP.")
    modules_to_save: list[str] | None = help_field("Modules trained in full beside the adapter, such as lm_head.")
    loraplus_lr_ratio: float = help_field("LoRA+: learning rate of B divided by that of A.", 16.0)
    num_virtual_tokens: int = help_field("Prompt and prefix tuning: number of virtual tokens.", 20)
    prompt_tuning_init_text: str | None = help_field("Prompt tuning: text that initializes the virtual tokens.")

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
    refused: typing.ClassVar[dict[str, dict[str, str]]] = {
        "training": Recipe.refused["training"]
        | dict.fromkeys(("train_memory_length", "memory_reset_probability"), NO_MEMORY),
        "data": {
            "tokenizer_vocab_size": KEEPS,
            "streaming": "finetuning reads its data first; leave it out",
        },
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


def finetune_parser() -> argparse.ArgumentParser:
    """The flags of `acorn finetune`."""
    adapters = "\n".join(f"  {name:<10} {adapter.about}" for name, adapter in ADAPTERS.items())
    about = (
        "Finetune a pretrained model on a text, pairs or a chat. A text file whose first line begins with `User:` or\n"
        f"`System:` is read as conversations.\n\nadapters:\n{adapters}"
    )
    takes = ("RECIPE-OR-MODEL", f"{', '.join(shipped_recipes(FinetuneRecipe))}, a YAML file, a Hub id or a directory")
    parser = recipe_parser("finetune", about, EXAMPLES, FinetuneRecipe, takes=takes)
    parser.add_argument("--preview", action="store_true", help="print one training example token by token, and stop")
    return parser


def load_finetune_recipe(argv: list[str]) -> FinetuneRecipe:
    """The recipe that RECIPE-OR-MODEL names, with flags laid over; a model's id or path is a recipe of defaults."""
    parsed = finetune_parser().parse_args(argv)
    name, flags = parsed.recipe, given_values(parsed, FinetuneRecipe)
    if name is None:
        names = ", ".join(shipped_recipes(FinetuneRecipe))
        raise UserError(f"acorn finetune needs a RECIPE ({names}, or a YAML file) or a MODEL (a Hub id or a directory)")
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


def refuse_ungrown(name: str) -> None:
    """Refuse the run of a shipped recipe that was not grown yet: it is no Hub id."""
    base = Path(name)
    if base.parent == Path("runs") and base.name in shipped_recipes() and not base.exists():
        grow = shell("acorn", "pretrain", base.name)
        raise UserError(f"model_name_or_path={name!r}: is not there; `{grow}` grows it")
