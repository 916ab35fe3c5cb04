"""`acorn lab EXPERIMENT …`: what context and memory are worth, each question one command with a table and a picture."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

from training.system.errors import UserError, quiet_libraries, run_main, unknown
from training.system.flags import FlagParser
from training.system.shell import shell

# An experiment: its question. Its module in experiments/, of the same name, has ABOUT and EPILOG (for the help),
# add_flags(add) and run(flags, out), where out is an Output of experiments/common.py.
EXPERIMENTS = {
    "window": "what becomes of a model past the context it was trained with, and what mends it?",
    "extend": "how many steps of training does a longer context need?",
    "linear": "what does a state of a fixed size cost, and what does it save?",
    "kv": "how small can the KV cache be? Loss and recall through every cache policy, against its bits",
    "floor": "what can be had without any cache, and what is the past worth to a model?",
    "xl": "what is a memory of the segments before worth, and how far past its training length?",
}


def main(argv: list[str] | None = None) -> None:
    """Run the experiment that the command line names."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return
    if name not in EXPERIMENTS:
        raise unknown("experiment", name, EXPERIMENTS, mend="`acorn lab --help` says what each asks.")
    experiment = import_module(f"inference.experiments.{name}")
    flags = parse(name, experiment, rest)
    quiet_libraries()
    from .experiments.common import Output  # here, because help need not wait for torch

    asked = {"experiment": name} | {key: value for key, value in vars(flags).items() if key != "output_dir"}
    out = Output(flags.output_dir, asked, shell("acorn", "lab", name, *rest))
    experiment.run(flags, out)
    out.finish()


def parse(name: str, experiment: ModuleType, argv: list[str]) -> argparse.Namespace:
    """The experiment's own flags, and those that every one has."""
    parser = FlagParser(prog=" ".join(("acorn", "lab", name)), description=experiment.ABOUT, epilog=experiment.EPILOG)
    experiment.add_flags(parser.add_argument)
    add = parser.add_argument_group("of every experiment").add_argument
    add("--smoke", action="store_true", help="a small version, which takes minutes on two cores")
    add("--seed", type=int, default=1337, help="of everything that is drawn at random")
    where = Path("runs", f"lab-{name}")
    add("--output_dir", type=Path, default=where, help="new directory for results.jsonl and pictures")
    flags = parser.parse_args(argv)
    if str(flags.output_dir) in ("", "."):
        raise UserError(f"output_dir={str(flags.output_dir)!r}: name a new directory")
    flags.output_dir = flags.output_dir.expanduser()
    return flags


def help_text() -> str:
    """The experiments, and what to type next."""
    lines = ["usage: acorn lab EXPERIMENT [--flag value ...]", "", "Measure what context and memory are worth.", ""]
    lines += [f"  {name:<8}{question}" for name, question in EXPERIMENTS.items()]
    lines += ["", "An experiment's own flags:  acorn lab kv --help"]
    return "\n".join([*lines, "Type next:                  acorn lab kv runs/quickstart --smoke"])


if __name__ == "__main__":
    run_main(main)
