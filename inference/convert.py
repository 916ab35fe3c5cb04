"""`acorn convert SRC DST --to acorn|gpt2|nanogpt`: a model from one format into another, with its logits compared."""

import argparse
from pathlib import Path

from training.system.errors import quiet_libraries, run_main
from training.system.flags import FlagParser
from training.system.shell import shell

from .formats import FORMATS
from .formats.conversion import convert

EPILOG = """SRC may be a run or model directory of Acorn's, a stock GPT2LMHeadModel (directory or Hub id), or a
checkpoint (ckpt.pt, or the directory that holds it) of nanoGPT's or of its rotary sibling; the format is detected.

The weights are written in float32. The logits of SRC and of what was written are compared on random tokens, each
computed as its format defines them; where they differ nothing is left in DST.

--num_key_value_heads makes another model of it: key and value heads are pooled into so many, each the mean of a group
(GQA, arXiv 2305.13245), and the cache is as many times smaller. It has to be trained on a little then.

examples:
  acorn convert gpt2 models/gpt2 --to acorn                    OpenAI's weights, ready for `acorn finetune`
  acorn convert runs/my-gpt2 models/stock --to gpt2            for every tool that knows GPT-2
  acorn convert nanoGPT/out-shakespeare-char models/char --to acorn
  acorn convert models/char out-char --to nanogpt              for nanoGPT's sample.py and train.py
  acorn convert runs/quickstart models/multi-query --to acorn --num_key_value_heads 1
  acorn pretrain quickstart --model_name_or_path models/multi-query --max_steps 100"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn convert",
        description="Turn stock GPT-2 and nanoGPT checkpoints into Acorn's, and back.",
        epilog=EPILOG,
    )
    parser.add_argument("src", metavar="SRC", help="directory, checkpoint file or Hub id")
    parser.add_argument("dst", metavar="DST", type=Path, help="output directory; it must be empty or not exist")
    written = [name for name, kind in FORMATS.items() if kind.is_written]
    parser.add_argument("--to", required=True, choices=written, help="format to convert to")
    parser.add_argument("--tokenizer", help="directory, Hub id or byte (default: the one beside SRC, else GPT-2's)")
    pooled = "pool key and value heads into so many (default: as many as SRC has)"
    parser.add_argument("--num_key_value_heads", type=int, help=pooled)
    parser.add_argument("--meta", help="meta.pkl of nanoGPT's character model (default: beside SRC or in data/)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Convert, and print the largest difference of logits and what to type next."""
    flags = parse(argv)
    quiet_libraries()
    pooled = flags.num_key_value_heads
    lines = convert(flags.src, flags.to, flags.dst, flags.tokenizer, flags.meta, pooled)
    command = f"{shell('acorn', 'generate', flags.dst)} --prompt …"
    if pooled is not None:
        command = f"{shell('acorn', 'pretrain', 'RECIPE', model_name_or_path=flags.dst)} --max_steps …"
    shows = flags.to == "acorn" or (flags.to != "nanogpt" and pooled is None)
    lines.append(f"{flags.dst} is written." + (f" Next:\n  {command}" if shows else ""))
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
