"""The door: `acorn VERB …` calls the `main` of one module, imported only then."""

import gc
import sys
from importlib import import_module
from types import ModuleType

from training.system.errors import run_main, unknown

__version__ = "0.1.0"

# verb: (the module whose main() does it, what it does), in the order of the straight line
VERBS = {
    "recipes": ("training.list_recipes", "list the recipes, or print one"),
    "estimate": ("training.estimate", "estimate the parameters, memory and time of a recipe"),
    "tokenizer": ("training.train_tokenizer", "train a byte, character or BPE tokenizer on a text"),
    "prepare": ("training.prepare", "turn a text into shards of tokens"),
    "pretrain": ("training.pretrain", "pretrain a GPT from a recipe"),
    "resume": ("training.resume", "continue a stopped run, of pretrain or finetune"),
    "finetune": ("finetune.finetune", "finetune a pretrained model on a text or a chat, with an adapter or in full"),
    "merge": ("finetune.merge", "merge an adapter into its base model"),
    "evaluate": ("inference.evaluate", "measure loss, perplexity and bits per byte"),
    "inspect": ("inference.inspect", "draw attention maps, positions and next tokens of a prompt"),
    "generate": ("inference.generate", "generate text with a model"),
    "chat": ("inference.chat", "talk with a model in the terminal"),
    "serve": ("inference.serve", "serve a model by the OpenAI protocol"),
    "playground": ("inference.playground", "write and talk with a model on a page in the browser"),
    "lab": ("inference.lab", "measure what context and memory are worth: small KV caches, long contexts"),
    "convert": ("inference.convert", "convert GPT-2 and nanoGPT checkpoints to Acorn's, and back"),
    "export": ("inference.export", "write a model for llama.cpp, ONNX Runtime and other programs"),
    "push": ("inference.push", "upload a model or an adapter to the Hub"),
}

# the first verb of a stage: the heading the help puts above it
HEADINGS = {
    "recipes": "Choose",
    "tokenizer": "Text to tokens",
    "pretrain": "Tokens to model",
    "finetune": "Pretrained model to yours",
    "evaluate": "Use it",
}


def main(argv: list[str] | None = None) -> None:
    """Run the verb that the command line names."""
    run_main(call_verb, sys.argv[1:] if argv is None else argv)


def call_verb(argv: list[str]) -> None:
    """Import the verb's module and hand it the rest of the line; a `UserError` names an unknown verb's neighbour."""
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        print(help_text())
    elif verb in ("-V", "--version"):
        print(f"acorn {__version__}")
    elif verb in VERBS:
        module_of(verb).main(rest)
    else:
        raise unknown("verb", verb, VERBS, mend="`acorn --help` lists them.")


def module_of(verb: str) -> ModuleType:
    """Import what does the verb, with garbage collection paused.

    To look again and again through what imports make, all of which stays, took a third of their CPU time, and each
    later collection a quarter of a second.
    """
    name = VERBS[verb][0]
    if name not in sys.modules:
        gc.disable()
        try:
            import_module(name)
        finally:
            gc.freeze()
            gc.enable()
    return sys.modules[name]


def help_text() -> str:
    """Lay out the verbs by stage, and what to type next."""
    lines = ["usage: acorn VERB RECIPE-OR-DIRECTORY [--flag value ...]", "", "Plant a text, grow a GPT."]
    for verb, (_, description) in VERBS.items():
        if verb in HEADINGS:
            lines += ["", f"{HEADINGS[verb]}:"]
        lines.append(f"  {verb:<11}{description}")
    lines += ["", "A verb's own flags:  acorn pretrain --help", "Type next:           acorn pretrain quickstart"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
