"""How many steps does a model with pooled heads need? Prints one JSON line.

    python benchmarks/pooled_heads.py RUN --recipe NAME --work DIR [--heads 1 2] [--steps 0 10 30 100] [--seed 1337]

RUN is a finished run of the recipe. Its key and value heads are pooled (`acorn convert --num_key_value_heads`), and the
pooled model is trained for so many steps more, at learning rates that fall from half the recipe's to zero within them.
Beside it stands RUN itself with all its heads, trained as long and alike. Losses are of the whole held-out text.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.config.command_line import load_recipe
from training.config.recipe import Recipe, load_recipe_file
from training.grown import grown
from training.share.metrics_file import read_metrics

ACORN = Path(__file__).parents[1] / "acorn.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 10, 30, 100])
    parser.add_argument("--seed", type=int, default=1337)
    flags = parser.parse_args()
    flags.work.mkdir(parents=True, exist_ok=True)
    starts, rows = {"all": flags.run}, {}
    for heads in flags.heads:
        starts[str(heads)] = flags.work / f"pooled-{heads}"
        if not starts[str(heads)].is_dir():
            pool(flags.run, starts[str(heads)], heads)
    for name, start in tqdm(starts.items(), file=sys.stderr, disable=None):
        rows[name] = {steps: round(loss_after(flags, name, start, steps), 4) for steps in flags.steps}
    print(json.dumps({"run": str(flags.run), "loss_by_kv_heads_and_steps": rows}))


def loss_after(flags: argparse.Namespace, name: str, start: Path, steps: int) -> float:
    """The held-out loss after so many steps from `start`."""
    rows = read_metrics(grown(flags.work / f"{name}-{steps}", lambda: recipe_from(flags, start, steps)))
    return rows[0]["eval_loss"] if steps == 0 else rows[-1]["eval_loss"]


def recipe_from(flags: argparse.Namespace, start: Path, steps: int) -> Recipe:
    """The recipe of so many steps from `start`, evaluated at their end; for 0 of them before the first."""
    recipe = load_recipe_file(flags.recipe).training
    rates = ("learning_rate", "muon_learning_rate")
    settings = {name: recipe[name] / 2 for name in rates if name in recipe}
    settings |= {"model_name_or_path": start, "seed": flags.seed, "max_new_tokens": 0}
    settings |= {"max_steps": max(steps, 1), "eval_steps": max(steps, 1), "warmup_steps": 0}
    settings |= {"eval_on_start": "true"} if steps == 0 else {}
    settings |= {"lr_scheduler_type": "linear", "data_dir": data_of(flags.run)}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return load_recipe("pretrain", [flags.recipe, *words])


def data_of(run: Path) -> str:
    """The prepared tokens that a run was grown from."""
    return load_recipe_file(str(run / "recipe.yaml")).data["data_dir"]


def pool(run: Path, pooled: Path, heads: int) -> None:
    """Convert a run into a model with fewer key and value heads; what it prints goes to stderr."""
    words = ["convert", run, pooled, "--to", "acorn", "--num_key_value_heads", heads]
    subprocess.run([sys.executable, str(ACORN), *map(str, words)], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
