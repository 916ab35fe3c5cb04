"""`acorn playground MODEL`: a page on this machine to write and talk with a model, and to see what it holds likely."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version

from training.model.chat_template import render_messages
from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options
from training.model.sampling import Rendered, context_left, continue_ids, encode_prompt, prompt_tensor
from training.system.errors import UserError, log, quiet_libraries, run_main
from training.system.flags import FlagParser

from .serving.conversation import answer_ends
from .serving.listening import address_of, is_open_to_others, listen
from .serving.space import GRADIO
from .serving.writing import Refused, Writer

EPILOG = """examples:
  acorn playground runs/quickstart
  acorn playground runs/my-chat --port 8000
  acorn playground gpt2 --host 0.0.0.0                  for everyone who can reach this machine

The page as a Space on the Hub: acorn push runs/quickstart me/my-space --space"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; those of the page are named as `acorn serve` names them."""
    parser = FlagParser(
        prog="acorn playground",
        description="Open a page in the browser: a prompt, or a chat where the model has a template for one; text "
        "that arrives token by token, coloured by probability, with what else was likely; and the attention of any "
        "token. Only this machine reaches the page, unless --host or --share says otherwise.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, adapter, model directory or Hub id")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every address of this machine")
    add("--port", type=int, default=7860, help="port to listen at; 0: one that is free")
    add("--share", action="store_true", help="also ask gradio's servers for a public link, which anyone can open")
    add_loading_flags(add)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    flags = parse(argv)
    refuse_missing_gradio()
    quiet_libraries()
    options = loading_options(flags)
    with listen(flags.host, flags.port) as listening:  # before the model is loaded: a port in use is said at once
        address, is_open = address_of(listening), is_open_to_others(listening)
        port = listening.getsockname()[1]
        model, tokenizer = load_model_and_tokenizer(flags.model, **options)
    from .serving.page import build_page, open_page  # gradio takes seconds to import

    writer = AcornWriter(model, tokenizer, context_left(model), answer_ends(model, tokenizer))
    blocks = build_page(writer, flags.model.rstrip("/") or flags.model)
    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    with redirect_stdout(sys.stderr):  # gradio explains at length why there is no link
        open_page(blocks, server_name=host, server_port=port, share=flags.share, quiet=True)
    say_where(address, flags, is_open, blocks.share_url)
    while True:
        time.sleep(3600)


class AcornWriter(Writer):
    """The model as `acorn generate` and `acorn chat` use it: the same ids of a prompt, and on past the context."""

    def encode(self, prompt: str) -> list[int]:
        with refusals_for_the_page():
            return prompt_tensor(self.tokenizer, prompt, self.context)[0].tolist()

    def encode_chat(self, messages: list[dict]) -> list[int]:
        with refusals_for_the_page():
            text = render_messages(self.tokenizer, "the conversation", messages, add_generation_prompt=True)
            return encode_prompt(self.tokenizer, Rendered(text), "the conversation")

    def grow(self, ids: torch.Tensor, max_new_tokens: int, **generation) -> None:
        continue_ids(self.model, ids, max_new_tokens, ends=self.ends, **generation)


@contextmanager
def refusals_for_the_page() -> Iterator[None]:
    """What a verb would end with is shown on the page."""
    try:
        yield
    except UserError as error:
        raise Refused(str(error)) from error


def say_where(address: str, flags: argparse.Namespace, is_open: bool, link: str | None) -> None:
    """Where the page is, and who else can open it."""
    if is_open:
        log(f"{flags.host}: whoever reaches this machine can use the page.")
    if flags.share:
        log(f"Whoever has this link can use the page: {link}" if link else "--share: gradio's servers gave no link.")
    log(f"{flags.model} is on this page until Ctrl-C:")
    print(address, flush=True)


def refuse_missing_gradio() -> None:
    """Refuse to go on without the package of the extra, or with one from before what the page asks of it."""
    found = gradio_version()
    if found is None or Version(found) < Version(GRADIO):
        has = f"; {found} is installed" if found else ""
        raise UserError(
            f"acorn playground: needs gradio {GRADIO} or newer{has}: .venv/bin/pip install -e '.[playground]'"
        )


def gradio_version() -> str | None:
    """The version of gradio that is installed, if any."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_main(main)
