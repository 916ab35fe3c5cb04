"""`acorn VERB --help`: the flags that matter, their defaults, and an example; the rest by reference."""

import dataclasses
import sys
import textwrap

from .arguments import CardArguments, DataArguments, GPTTrainingArguments, SampleArguments

TRAINING_FLAGS = """
output_dir max_steps num_train_epochs tokens_per_step per_device_train_batch_size gradient_accumulation_steps optimizer
learning_rate muon_learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm precision force_precision
torch_compile torch_compile_mode torch_compile_backend compile_scope
activation_checkpointing eval_steps save_steps save_total_limit early_stopping_patience seed report_to
push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision hub_always_push
"""
MODEL_FLAGS = """
preset n_layer n_head n_embd n_kv_head block_size dropout bias position_encoding norm hidden_act gated_mlp qk_norm
layer_types sliding_window tie_word_embeddings attn_implementation
"""
USAGES = {
    "prepare": (
        "acorn prepare RECIPE [--flag value …]\n\n"
        "Turn the recipe's text into token shards; `acorn pretrain` does it by itself too.",
        "acorn prepare quickstart --text_files my_texts/ --tokenizer bpe --tokenizer_vocab_size 4096",
    ),
    "tokenizer": (
        "acorn tokenizer [RECIPE] --tokenizer byte|char|bpe --output_dir DIR [--flag value …]\n\n"
        "Build a tokenizer from text and save it as a Hugging Face tokenizer.",
        "acorn tokenizer --tokenizer bpe --tokenizer_vocab_size 8192 --text_files book.txt --output_dir my_tokenizer",
    ),
    "pretrain": (
        "acorn pretrain RECIPE [--flag value …]\n\n"
        "Grow a GPT from a text. RECIPE is a shipped name (`acorn recipes`) or a YAML file.",
        "acorn pretrain shakespeare-char-cpu --text_files my.txt --max_steps 500 --output_dir runs/mine",
    ),
    "resume": (
        "acorn resume RUN_DIR [--checkpoint last|best|checkpoint-N] [--fresh_state true] [--flag value …]\n\n"
        "Continue a run of any kind exactly where it stopped; flags may change what can change, such as --max_steps.",
        "acorn resume runs/quickstart --max_steps 1200",
    ),
    "estimate": (
        "acorn estimate RECIPE [--gpu NAME] [--num_gpus N] [--sharding HOW] [--mfu SHARE] [--flag value …]\n\n"
        "Parameters, FLOPs, memory and time of a recipe, before it costs anything.",
        "acorn estimate gpt2-openwebtext --gpu a100-40gb --num_gpus 8",
    ),
}
SECTIONS_OF = {"prepare": ("data",), "tokenizer": ("data",)}


def wants_help(verb: str, argv: list[str] | None) -> bool:
    """Print the verb's help if it is asked for, and say whether it was."""
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(argv):
        return False
    usage, example = USAGES[verb]
    parts = [f"usage: {usage}"]
    for section in SECTIONS_OF.get(verb, ("data", "model", "training", "sample", "card")):
        parts.append(f"{section}:\n" + "\n".join(SECTION_HELP[section]()))
    if "training" in SECTIONS_OF.get(verb, ("training",)):
        parts.append("Every field of GPTConfig and of transformers.TrainingArguments is a flag and a recipe key too.")
    print("\n\n".join([*parts, f"example:\n  {example}"]))
    return True


def _fields(kind, names: list[str] | None = None) -> list[str]:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    return [_line(name, fields[name]) for name in names or fields]


def _line(name: str, field: dataclasses.Field) -> str:
    default = field.default if field.default is not dataclasses.MISSING else None
    shown = "" if default in (None, "") else f" [{default!r}]" if default == "\n" else f" [{default}]"
    text = " ".join(str(field.metadata.get("help", "")).split())
    text = text if len(text) < 100 else text[:97].rsplit(" ", 1)[0] + " …"
    return f"  --{name:<30} {text}{shown}"


def _model() -> list[str]:
    flags = " ".join(f"--{name}" for name in MODEL_FLAGS.split())
    return textwrap.wrap(flags, width=110, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


SECTION_HELP = {
    "data": lambda: _fields(DataArguments),
    "model": _model,
    "training": lambda: _fields(GPTTrainingArguments, TRAINING_FLAGS.split()),
    "sample": lambda: _fields(SampleArguments),
    "card": lambda: _fields(CardArguments),
}
