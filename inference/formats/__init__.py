"""The formats that `acorn convert` reads and writes: one file each, and one line in this table."""

from .acorn import Acorn
from .base import Format
from .gpt2 import GPT2
from .nanogpt import ByteRope, NanoGPT

FORMATS: dict[str, Format] = {
    "acorn": Acorn(),
    "gpt2": GPT2(),
    "nanogpt": NanoGPT(),
    "byte-rope": ByteRope(),
}
