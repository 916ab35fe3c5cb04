"""The command line of the verbs that take a recipe: a flag for each of its keys, their help, and what they change."""

import argparse
import dataclasses
import inspect
import sys

from transformers import TrainingArguments

from ..system.addresses import public_name
from ..system.errors import UserError
from ..system.flags import FlagParser
from ..system.shell import shell
from .recipe import Recipe, known_keys, load_recipe_file, read_section, shipped_recipes
from .values import from_words, is_list

SECTIONS = ("data", "training", "model", "adapter", "sample", "card")  # a flag that two know belongs to the first
# The usual fields of GPTConfig, whose own help is its docstring.
MODEL_HELP = {
    "preset": "Named architecture, such as gpt2; the other flags change it.",
    "model_name_or_path": "Acorn model whose weights to start from; the other flags change its architecture.",
    "depth": "One dial for size: layers, of which each is 64 of width; sets steps, batch, learning rates and decay.",
    "tokens_per_parameter": "With --depth: tokens to train on for each parameter in the blocks (default: 20).",
    "n_layer": "Number of layers.",
    "n_head": "Number of attention heads.",
    "n_embd": "Hidden size.",
    "n_kv_head": "Number of key and value heads (default: n_head).",
    "block_size": "Context length in tokens.",
    "dropout": "Dropout of embeddings, attention and residuals.",
    "bias": "Biases in linear layers and norms.",
    "position_encoding": "learned, sinusoidal, rope or none.",
    "norm": "layer_norm or rms_norm.",
    "hidden_act": "Activation of the MLP.",
    "gated_mlp": "Gated MLP (GLU).",
    "qk_norm": "Normalize queries and keys.",
    "layer_types": "full_attention, sliding_attention or linear_attention for each layer.",
    "linear_attention": "Kind of linear layers: elu (elu(x) + 1) or gated_delta.",
    "sliding_window": "Number of tokens that sliding attention looks back.",
    "bigram_vocab_size": "Rows of a hashed table of token pairs, added to the embeddings (default: none).",
    "value_embeddings": "Add embeddings of the tokens to the values of every other layer.",
    "num_nextn_predict_layers": "Heads that also learn to predict so many tokens after the next (default: 0).",
    "memory_length": "Tokens before each segment that the model keeps in memory (Transformer-XL); 0: none.",
    "tie_word_embeddings": "Share the embedding with the output layer.",
    "attn_implementation": "Attention kernel: sdpa, eager, flash_attention_2, flex_attention (default: sdpa).",
}


def recipe_parser(
    verb: str,
    about: str | None = None,
    examples: str = "",
    kind: type[Recipe] = Recipe,
    sections: tuple[str, ...] = SECTIONS,
    takes: tuple[str, str] = ("RECIPE", "shipped recipe (`acorn recipes` lists them) or YAML file"),
) -> FlagParser:
    """A parser with one flag for each key of a kind of recipe; `--help` shows the usual ones of `sections`."""
    more = "Every field of transformers.TrainingArguments is a flag and a recipe key, too.\n\n"
    parser = FlagParser(
        prog=f"acorn {verb}",
        usage=f"acorn {verb} {takes[0]} [--flag value ...]",
        description=about,
        epilog=f"{more if 'training' in sections else ''}examples:\n{examples}",
    )
    parser.add_argument("recipe", metavar=takes[0], nargs="?", help=takes[1])
    seen = set()
    for section in SECTIONS:
        group, texts = parser.add_argument_group(section), _help_texts(kind, section) if section in sections else {}
        hints = known_keys(kind).get(section, {})
        for key in dict.fromkeys([*texts, *hints]):
            if key not in seen:
                action = "extend" if is_list(hints[key]) else "store"
                shown = texts[key].replace("%", "%%") if key in texts else argparse.SUPPRESS
                where = {"dest": f"{section}.{key}", "default": argparse.SUPPRESS}
                group.add_argument(f"--{key}", nargs="*", action=action, help=shown, **where)
            seen.add(key)
    return parser


def given_values(flags: argparse.Namespace, kind: type[Recipe] = Recipe) -> dict[str, dict]:
    """The recipe's keys among the parsed flags, by section, checked and in their fields' types."""
    found: dict[str, dict] = {}
    for dest, words in vars(flags).items():
        section, dot, key = dest.partition(".")
        if dot:
            found.setdefault(section, {})[key] = from_words(key, words, known_keys(kind)[section][key])
    return {section: read_section(section, values, kind) for section, values in found.items()}


def recipe_of(flags: argparse.Namespace, verb: str) -> Recipe:
    """The recipe that the command line names, with its flags laid over."""
    if flags.recipe is None:
        raise UserError(f"acorn {verb} needs a RECIPE: one of {', '.join(shipped_recipes())}, or a YAML file")
    recipe = load_recipe_file(flags.recipe)
    given = given_values(flags)
    recipe.update(given, data_dir_is_source=verb != "prepare")
    recipe.turn_dial()
    recipe.start_from_another(given.get("data", {}))
    recipe.check()
    return recipe


def load_recipe(verb: str, argv: list[str] | None, **about) -> Recipe:
    """The recipe of a verb that has no flags beside the recipe's; `about` is for its help."""
    argv = sys.argv[1:] if argv is None else argv
    recipe = recipe_of(recipe_parser(verb, **about).parse_args(argv), verb)
    recipe.command = shell("acorn", verb, *map(public_name, argv))
    return recipe


def _help_texts(kind: type[Recipe], section: str) -> dict[str, str]:
    """The keys that `--help` shows, and their help with the default: those that have a help text of Acorn's."""
    if section not in kind.sections:
        return MODEL_HELP if section == "model" else {}
    texts = {}
    for parent in reversed(kind.sections[section].__mro__):
        own = {} if parent is TrainingArguments else inspect.get_annotations(parent)
        helps = {name: parent.__dataclass_fields__[name].metadata.get("help") for name in own}
        texts |= {name: text for name, text in helps.items() if text}
    for field in dataclasses.fields(kind.sections[section]):
        if field.name in texts and field.default is not False and field.default not in (None, dataclasses.MISSING):
            shown = repr(field.default) if field.default == "\n" else field.default
            texts[field.name] += f" (default: {shown})"
    return {name: text for name, text in texts.items() if name not in kind.refused.get(section, ())}
