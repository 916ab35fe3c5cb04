"""`acorn export MODEL DST --format gpt2|gguf|onnx|vllm-check`: a model for other programs to run."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from training.system.errors import UserError, quiet_libraries, run_main
from training.system.files import making, new_directory
from training.system.flags import FlagParser
from training.system.shell import shell

from .formats.backends import report
from .formats.conversion import convert, read_model
from .formats.gguf import FILE_TYPES, write_gguf
from .formats.onnx import check_version, write_onnx

EPILOG = """formats:
  gguf        a file for llama.cpp, Ollama and LM Studio, with the tokenizer
  onnx        a directory for ONNX Runtime: one graph with a cache, its logits compared
  gpt2        a directory that transformers' own GPT-2 loads, its logits compared
  vllm-check  writes nothing: what the Transformers backends of vLLM and SGLang would miss in a directory

An adapter is merged first: `acorn merge`.

examples:
  acorn export runs/quickstart quickstart.gguf --format gguf    for llama.cpp, Ollama and LM Studio
  acorn export runs/char char.gguf --format gguf --outtype q8_0
  acorn export runs/quickstart models/onnx --format onnx        for ONNX Runtime
  acorn export runs/quickstart --format vllm-check              what vLLM and SGLang would say
  acorn export models/gpt2 models/stock --format gpt2           for every tool that knows GPT-2"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags."""
    parser = FlagParser(
        prog="acorn export",
        description="Write a model for other programs. What a program cannot hold is refused, with the field's name.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL", help="run, model directory, nanoGPT checkpoint, stock GPT-2, Hub id")
    parser.add_argument("dst", metavar="DST", type=Path, nargs="?", help="file or directory to write, not there yet")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write, or to check")
    parser.add_argument("--outtype", choices=FILE_TYPES, help="gguf: type of the matrices (default: f16)")
    parser.add_argument("--tokenizer", help="directory, Hub id or byte (default: the one beside the model)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the model, and print what was written and what to type next."""
    flags = parse(argv)
    quiet_libraries()
    if flags.outtype is not None and flags.format != "gguf":
        raise UserError(f"--outtype {flags.outtype}: is for --format gguf; leave it out")
    if flags.dst is None and flags.format != "vllm-check":
        raise UserError(f"--format {flags.format}: needs DST, the place to write to")
    if missing := [name for name in NEEDS.get(flags.format, ()) if find_spec(name) is None]:
        install = f".venv/bin/pip install -e '.[{flags.format}]'"
        raise UserError(f"--format {flags.format}: needs {', '.join(missing)}: {install}")
    print("\n".join(FORMATS[flags.format](flags)))


def export_gpt2(flags) -> list[str]:
    """A directory that transformers' own GPT-2 loads."""
    lines = convert(flags.model, "gpt2", flags.dst, flags.tokenizer)
    return [*lines, f"{flags.dst} is written. Next:", f"  {shell('acorn', 'generate', flags.dst)} --prompt …"]


def export_gguf(flags) -> list[str]:
    """A file that llama.cpp runs."""
    if flags.dst.suffix != ".gguf":
        raise UserError(f"{flags.dst}: name a file that ends in .gguf")
    if flags.dst.exists():
        raise UserError(f"{flags.dst}: already exists; choose another name, or remove it")
    with making(flags.dst.parent, str(flags.dst)):
        model, tokenizer = read_model(flags.model, flags.tokenizer)
        if tokenizer is None:
            raise UserError(f"{flags.model}: has no tokenizer, and a GGUF file holds one; name it with --tokenizer")
        title = Path(flags.model).absolute().name
        lines = write_gguf(model, tokenizer, flags.dst, flags.outtype or "f16", title)
    return lines + next_gguf(flags.dst, tokenizer)


def next_gguf(path: Path, tokenizer) -> list[str]:
    """How to run the file: a chat where the tokenizer knows how one is written, else a text that goes on."""
    name = shell(path.stem)
    ollama = f"echo FROM {shell(path.absolute())} > Modelfile && ollama create {name} && ollama run {name}"
    lines = ["Next, with llama.cpp or with Ollama:"]
    if tokenizer.chat_template:
        lines += [f"  {shell('llama-cli', '-m', path)}", f"  {ollama}"]
        return [
            *lines,
            "Ollama reads no Jinja: for a chat there, write the template anew as TEMPLATE in the Modelfile.",
        ]
    return [*lines, f"  {shell('llama-completion', '-m', path)} -p …", f"  {ollama}"]


def export_onnx(flags) -> list[str]:
    """A directory with a graph that ONNX Runtime runs."""
    check_version()
    with new_directory(flags.dst) as building:
        model, tokenizer = read_model(flags.model, flags.tokenizer)
        lines = write_onnx(flags.model, model, tokenizer, building)
    example = f"onnxruntime.InferenceSession({str(flags.dst / 'model.onnx')!r})"
    return [
        *lines,
        f"{flags.dst} is written: model.onnx, its weights and its tokenizer. Next, in Python:",
        f"  {example}",
    ]


def check_backends(flags) -> list[str]:
    """What vLLM and SGLang need of a directory; nothing is written."""
    if flags.dst is not None or flags.tokenizer is not None:
        raise UserError("--format vllm-check: writes nothing; leave out DST and --tokenizer")
    return report(flags.model)


FORMATS = {"gpt2": export_gpt2, "gguf": export_gguf, "onnx": export_onnx, "vllm-check": check_backends}
NEEDS = {"gguf": ["gguf"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}  # packages of the extra of that name

if __name__ == "__main__":
    run_main(main)
