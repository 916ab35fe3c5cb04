"""`acorn finetune --help`: what it takes, the adapters, the flags, and examples."""

from training.config.help import _fields as fields_help

from .adapters import ADAPTERS
from .arguments import (
    AdapterArguments,
    FinetuneDataArguments,
    FinetuneRecipe,
    FinetuneSampleArguments,
    FinetuneTrainingArguments,
    ModelArguments,
)

DATA_FLAGS = """
text_files data_files dataset dataset_config dataset_split text_column data_format prompt_column completion_column
messages_column block_size packing validation_fraction validation_by sampling tokenizer
"""
TRAINING_FLAGS = """
output_dir max_steps num_train_epochs tokens_per_step per_device_train_batch_size gradient_accumulation_steps
learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm precision activation_checkpointing eval_steps
save_total_limit early_stopping_patience seed report_to push_to_hub hub_model_id
"""
EXAMPLES = """examples:
  acorn finetune gpt2 --text_files my.txt
  acorn finetune gpt2-lora-chat --text_files chat.txt --preview      one example, token by token
  acorn finetune runs/quickstart --data_files pairs.jsonl --adapter dora --r 8
  acorn resume runs/gpt2-lora --max_steps 500                      go on with a run
  accelerate launch -m finetune.finetune gpt2-full-text"""


def help_text() -> str:
    """The whole of it."""
    adapters = "\n".join(f"  {name:<10} {adapter.about}" for name, adapter in ADAPTERS.items())
    recipes = ", ".join(sorted(path.stem for path in FinetuneRecipe.directory.glob("*.yaml")))
    sections = {
        "model": fields_help(ModelArguments),
        "adapter (PEFT's names)": fields_help(AdapterArguments),
        "data": fields_help(FinetuneDataArguments, DATA_FLAGS.split()),
        "training": fields_help(FinetuneTrainingArguments, TRAINING_FLAGS.split()),
        "sample": fields_help(FinetuneSampleArguments),
    }
    parts = [
        "usage: acorn finetune RECIPE-OR-MODEL [--flag value …]\n"
        "       acorn finetune RECIPE-OR-MODEL … --preview\n\n"
        "Teach a pretrained model a text, pairs or a chat. MODEL is any causal LM: a Hub id, a model directory or an\n"
        f"Acorn run; RECIPE is one of {recipes}, or a YAML file.\n"
        "A text file whose first line begins `User:` or `System:` is read as conversations.",
        f"adapters:\n{adapters}",
        *(f"{section}:\n" + "\n".join(lines) for section, lines in sections.items()),
        "Every field of transformers.TrainingArguments is a flag and a recipe key too.",
        EXAMPLES,
    ]
    return "\n\n".join(parts)
