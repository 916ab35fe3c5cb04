"""`acorn serve MODEL`: the OpenAI protocol for any model, through transformers' own server."""

import argparse
import os
import signal
import socket
from contextlib import suppress
from importlib.util import find_spec

from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options
from training.system.errors import UserError, log, quiet_libraries, run_main
from training.system.flags import FlagParser
from training.system.shell import shell

from .serving.listening import address_of, is_open_to_others, listen

EPILOG = """examples:
  acorn serve runs/my-chat
  acorn serve runs/my-chat --port 8080 --continuous_batching
  ACORN_API_KEY=... acorn serve runs/my-chat --host 0.0.0.0

Any client of the OpenAI protocol then asks http://127.0.0.1:8000/v1: /models, /completions, /chat/completions."""
KEY_VARIABLE = "ACORN_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; names are `transformers serve`'s where it has one."""
    parser = FlagParser(
        prog="acorn serve",
        usage="acorn serve MODEL [--flag value ...]",
        description="Serve a model on this machine by the OpenAI protocol, until Ctrl-C.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, adapter, model directory or Hub id")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: every address of this machine")
    add("--port", type=int, default=8000, help="port to listen at; 0: one that is free")
    add(
        "--api_key",
        help=f"key that every call must bring; better in the variable {KEY_VARIABLE}, which `ps` does not show",
    )
    add("--continuous_batching", action="store_true", help="write the answers together, not one after the other")
    add("--log_level", default="warning", choices=["info", "warning"], help="info: a line for each request")
    add_loading_flags(add)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    flags = parse(argv)
    refuse_missing_packages()
    key = api_key(flags.api_key)
    quiet_libraries()
    options = loading_options(flags)
    with listen(flags.host, flags.port) as listening:  # before the model is loaded: a port in use is said at once
        model, tokenizer = load_model_and_tokenizer(flags.model, **options)
        name = flags.model.rstrip("/") or flags.model
        serve(model, tokenizer, name, listening, flags, key)


def serve(model, tokenizer, name: str, listening: socket.socket, flags, key: str | None) -> None:
    """Answer requests until a signal; the answers under way then have a few seconds to end."""
    import uvicorn

    from .serving.app import ServedModel, Server, build_app

    served = ServedModel(name, model, tokenizer, flags.continuous_batching)
    app = build_app(served, key, is_local=not is_open_to_others(listening))
    server = Server(uvicorn.Config(app, log_level=flags.log_level, lifespan="on"), served)
    say_where(listening, name, flags.host, has_template=bool(tokenizer.chat_template), has_key=key is not None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises anew what it was stopped by
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    log("stopped.")


def say_where(listening: socket.socket, name: str, host: str, has_template: bool, has_key: bool) -> None:
    """Where the server is, and what to type next."""
    address = address_of(listening)
    if not has_key and is_open_to_others(listening):
        log(f"{host}: whoever reaches this machine can ask the model; --api_key or {KEY_VARIABLE} asks for a key.")
    log(f"{name} is served at {address}/v1 until Ctrl-C. Type next, in another terminal:")
    path = "chat/completions" if has_template else "completions"
    asked = '"messages": [{"role": "user", "content": "Hello"}]' if has_template else '"prompt": "Once upon"'
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if has_key else ""
    log("  " + shell("curl", f"{address}/v1/{path}", "--json", f"{{{asked}}}") + key)


def api_key(flag: str | None) -> str | None:
    """The key of the flag or else of the environment; refuses one that no header can carry."""
    key, where = (flag, "--api_key") if flag is not None else (os.environ.get(KEY_VARIABLE), KEY_VARIABLE)
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{where}: must be letters, digits and signs of ASCII, without spaces")
    return key


def refuse_missing_packages() -> None:
    """Refuse to go on without the packages of the extra."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"acorn serve: needs {', '.join(missing)}: .venv/bin/pip install -e '.[serve]'")


if __name__ == "__main__":
    run_main(main)
