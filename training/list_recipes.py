"""`acorn recipes`: what can be grown without writing a line."""

from pathlib import Path

from training.system.errors import run_main, unknown
from training.system.flags import FlagParser

RECIPES = Path(__file__).parent / "recipes"
FINETUNING = Path(__file__).parent.parent / "finetune" / "recipes"


def main(argv: list[str] | None = None) -> None:
    """List the shipped recipes, or print one."""
    parser = FlagParser(prog="acorn recipes", description=main.__doc__)
    parser.add_argument("recipe", nargs="?", help="print this recipe, to read or to copy")
    name = parser.parse_args(argv).recipe
    recipes, finetuning = files_in(RECIPES), files_in(FINETUNING)
    if name is None:
        print(listing(recipes, finetuning))
    else:
        print(find(name, recipes | finetuning).read_text(encoding="utf-8"), end="")


def files_in(folder: Path) -> dict[str, Path]:
    """The recipes of a folder by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str, recipes: dict[str, Path]) -> Path:
    """Find a recipe by its name, with or without `.yaml`; a `UserError` names the nearest one."""
    stem = name.removesuffix(".yaml")
    if stem not in recipes:
        raise unknown("recipe", name, recipes, mend="`acorn recipes` lists them.")
    return recipes[stem]


def listing(recipes: dict[str, Path], finetuning: dict[str, Path]) -> str:
    """The recipes of both verbs, and what to type next."""
    lines = ["Recipes for acorn pretrain:", "", *aligned(recipes), "", "For acorn finetune:", "", *aligned(finetuning)]
    return "\n".join([*lines, "", "Type next:  acorn pretrain quickstart", "To read it: acorn recipes quickstart"])


def aligned(recipes: dict[str, Path]) -> list[str]:
    """One line a recipe: its name, and its first comment."""
    width = max(map(len, recipes))
    return [f"  {name:<{width}}  {first_comment(path)}".rstrip() for name, path in recipes.items()]


def first_comment(path: Path) -> str:
    """Read the first comment line of a recipe, which says what it grows."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


if __name__ == "__main__":
    run_main(main)
