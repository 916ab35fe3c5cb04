"""`acorn chat MODEL`: a conversation in the terminal, or with whatever is on standard input, one turn a line."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path

from training.model.loading import add_loading_flags, load_model_and_tokenizer, loading_options
from training.model.sampling import TextPrinter, context_left
from training.system.errors import UserError, one_line, quiet_libraries, run_main, unknown
from training.system.files import write_whole
from training.system.flags import FlagParser
from training.system.shell import shell

from .decoding.batches import Job, grow
from .decoding.held import add_cache, add_cache_flags, refuse_cache
from .decoding.strategies import (
    STRATEGIES,
    add_strategy_flags,
    generate_arguments,
    given_strategies,
    refuse_unknown_ids,
    settle,
)
from .serving.conversation import Continuation, Conversation, answer_ends, conversation_with

EPILOG = """examples:
  acorn chat runs/my-chat
  acorn chat runs/my-chat --system "You are a forester." --temperature 0.5
  acorn chat runs/my-chat < questions.txt          one turn a line"""
# Beams are not known before they end, and cannot be streamed.
STREAMED = tuple(
    name for name, strategy in STRATEGIES.items()
    if strategy.needs not in ("beams", "assistant") and name not in ("num_beams", "num_return_sequences")
)  # fmt: skip
NO_TEMPLATE = (
    "has no chat template: it continues text, and does not answer. What you type is continued, line by line, and Enter "
    "alone goes on. For answers finetune it on a chat: `acorn finetune MODEL --text_files chat.txt`."
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; names are generate()'s where it has one."""
    parser = FlagParser(
        prog="acorn chat",
        usage="acorn chat MODEL [--flag value ...]",
        description="Talk with a model in the terminal. Type a message and Enter; /help lists the commands.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("model", help="run directory, checkpoint, adapter, model directory or Hub id")
    add("--system", default="", help="what the model is told before the conversation")
    add("--seed", type=int, default=1337, help="seed of the sampling")
    add_loading_flags(add)
    add_strategy_flags(parser, STREAMED)
    add_cache_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Talk until the end of standard input or /exit."""
    flags = parse(argv)
    values = settle(given_strategies(flags))
    refuse_cache(flags, values)
    quiet_libraries()
    model, tokenizer = load_model_and_tokenizer(flags.model, **loading_options(flags))
    refuse_unknown_ids(values, model)
    conversation = conversation_with(tokenizer, context_left(model))
    set_system(conversation, flags.system)
    job = Job(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=values["max_new_tokens"],
        ends=answer_ends(model, tokenizer),
        stop_strings=values.get("stop_strings", ()),
        seed=flags.seed,
        generation=generate_arguments(values),
    )
    add_cache(job, flags)
    greet(conversation, flags.model)
    talk(job, conversation)
    if sys.stdin.isatty():
        note("Type next:  " + shell("acorn", "serve", flags.model))


def greet(conversation: Conversation, name: str) -> None:
    """Say what can be typed; of a base model also what it does instead of answering."""
    if isinstance(conversation, Continuation):
        note(f"{name} {NO_TEMPLATE}")
    if sys.stdin.isatty():
        note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")


def talk(job: Job, conversation: Conversation) -> None:
    """Turn for turn, to the end of the input; a person at a terminal can mend what is refused, a file can not."""
    is_person = sys.stdin.isatty()
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (gives input() its line editing and history)
    while True:
        try:
            line = read_line(is_person)
            if line.startswith("/") and not line.startswith("//"):
                run_command(conversation, line)
            elif line or isinstance(conversation, Continuation):
                answer(job, conversation, line.removeprefix("/") if line.startswith("//") else line)
        except EOFError:
            print(end="\n" if is_person else "")
            return
        except KeyboardInterrupt:
            if not is_person:
                raise
            print()
        except UserError as error:
            if not is_person:
                raise
            note(str(error))


def read_line(is_person: bool) -> str:
    """What is typed next; EOFError at its end."""
    try:
        return input("> " if is_person and sys.stdout.isatty() else "").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"your message: is not UTF-8 ({error.reason}); type it in UTF-8") from error


def answer(job: Job, conversation: Conversation, text: str) -> None:
    """Stream the model's answer; what Ctrl-C cuts off counts as said."""
    fallen = conversation.fallen
    ids = conversation.ask(text, job.max_new_tokens)
    if conversation.fallen > fallen:
        note(f"(the context is full: the oldest {conversation.fallen} {conversation.unit} are no longer read)")
    said: list[str] = []
    printer = TextPrinter(job.tokenizer, ids, lambda piece: show(piece, said), job.stop_strings)
    try:
        grow(job.alone(len(conversation.turns) // 2), [ids], printer)
        printer.finish()
    except UserError:
        conversation.take_back()
        raise
    except KeyboardInterrupt:
        conversation.answered("".join(said))
        raise
    conversation.answered("".join(said))
    print(flush=True)


def show(piece: str, said: list[str]) -> None:
    """Print a piece of the answer, less the space that it begins with."""
    said.append(piece)
    print(piece.lstrip() if not "".join(said[:-1]).strip() else piece, end="", flush=True)


# ---- commands


def run_command(conversation: Conversation, line: str) -> None:
    """What a line that begins with a slash asks for."""
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    run, takes, _ = COMMANDS[name]
    if rest.strip() and not takes:
        raise UserError(f"{name} takes no more words; a message that begins with a slash has two")
    run(conversation, rest.strip())


def list_commands(conversation: Conversation, rest: str) -> None:
    for name, (_, takes, what) in COMMANDS.items():
        note(f"{f'{name} {takes}':<14}{what}")


def forget(conversation: Conversation, rest: str) -> None:
    conversation.reset()
    note("(forgotten)")


def start_anew(conversation: Conversation, text: str) -> None:
    set_system(conversation, text)
    note("(the conversation starts anew)")


def leave(conversation: Conversation, rest: str) -> None:
    raise EOFError


def set_system(conversation: Conversation, text: str) -> None:
    """Give the model another system message, and let the conversation start anew."""
    if text and isinstance(conversation, Continuation):
        raise UserError("system: this model has no chat template, and so no system message; begin the text with it")
    conversation.system = text
    conversation.reset()


def save(conversation: Conversation, name: str) -> None:
    """Write the conversation to a file that is not there yet."""
    if not name:
        raise UserError("/save: name a file, such as /save chat.jsonl")
    try:
        path = Path(name).expanduser()
        if path.exists():
            raise UserError(f"/save {name}: is there already; choose another name")
        write_whole(path, json.dumps({"messages": conversation.messages}, ensure_ascii=False) + "\n")
    except (OSError, ValueError, RuntimeError) as error:  # of the system; of NUL in a name; of a ~name that is nobody
        raise UserError(f"/save {name!r}: {one_line(error)}; choose another name") from error
    note(f"(saved in {name})")


# what is typed: what it does, what it takes, and what is said of it
COMMANDS = {
    "/help": (list_commands, "", "what can be typed besides messages"),
    "/reset": (forget, "", "forget what was said"),
    "/system": (start_anew, "TEXT", "start anew with another system message, or with none"),
    "/save": (save, "FILE", "keep the conversation as a line of JSON, which `acorn finetune` reads"),
    "/exit": (leave, "", "end, as Ctrl-D does; Ctrl-C stops an answer"),
}


def note(line: str) -> None:
    """Say something beside the conversation."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
