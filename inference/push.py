"""`acorn push RUN_OR_MODEL_DIR REPO_ID`: a model or an adapter, with its code and card, or a page of it, to the Hub."""

import argparse
from pathlib import Path

from huggingface_hub import ModelCard, get_token
from tqdm import tqdm

from training.config.publishing import NO_TOKEN, NOT_CHOSEN, check_license, check_repo_id
from training.share.hub import HUB_ERRORS, finish_files, send, why_push_failed
from training.share.report import card_of
from training.share.uploads import Upload, refuse_no_model, sort_files
from training.system.errors import UserError, quiet_libraries, run_main
from training.system.flags import FlagParser
from training.system.run_files import verify
from training.system.shell import shell

from .serving.space import DOCUMENTS, SDK, space_files

EPILOG = """examples:
  acorn push runs/quickstart me/my-gpt --dry_run                what would go up, and why; needs no network
  acorn push runs/quickstart me/my-gpt --license apache-2.0
  acorn push runs/quickstart/checkpoint-225 me/my-gpt --revision step-225 --private
  acorn push runs/my-adapter me/my-adapter --base_model openai-community/gpt2
  acorn push runs/quickstart me/my-page --space         a Space: the page of `acorn playground` with this model

The token: HF_TOKEN, or what `hf auth login` stored. HF_ENDPOINT names another Hub."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The verb's flags; names are huggingface_hub's where it has one."""
    parser = FlagParser(
        prog="acorn push",
        description="Upload a model or an adapter in one commit: weights, modeling code, tokenizer, generation config, "
        "card, and what a run measured. What only a resume needs, pickles and temporary files stay here.",
        epilog=EPILOG,
    )
    parser.add_argument("directory", metavar="RUN_OR_MODEL_DIR", type=Path, help="run, checkpoint, model or adapter")
    parser.add_argument("repo_id", metavar="REPO_ID", help="YOU/NAME, or NAME alone for the token's owner")
    parser.add_argument("--dry_run", action="store_true", help="list what would be uploaded and why, and stop")
    parser.add_argument("--space", action="store_true", help="make a Space: a page that everyone can try the model on")
    parser.add_argument("--private", action="store_true", help="create a new repository as private")
    parser.add_argument("--revision", help="branch to commit to; created if missing (default: main)")
    parser.add_argument("--commit_message", help="message of the commit (default: Upload NAME with Acorn)")
    parser.add_argument("--license", help="license of the weights by its Hub name (default: the card's, or unknown)")
    parser.add_argument("--base_model", help="Hub id of the base model, if the directory only knows a path")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Send the directory, or say what would be sent."""
    flags = parse(argv)
    quiet_libraries()
    check_repo_id(flags.repo_id)
    check_license(flags.license)
    refuse_no_model(flags.directory)
    verify(flags.directory)
    going, staying = sort_files(flags.directory)
    files = finish_files(flags.directory, going, card_of(flags.directory), flags.license, flags.base_model)
    if flags.space:
        staying += [file for file in going if file.name in DOCUMENTS]
        files = space_files(flags.directory, files, flags.repo_id)
    print(listing(flags, files, staying) if flags.dry_run else summary(flags, files))
    if not flags.dry_run:
        push(flags, files)


def push(flags: argparse.Namespace, files: list[Upload]) -> None:
    """One commit; whatever keeps it back is one line."""
    if get_token() is None:
        raise UserError(NO_TOKEN)
    message = flags.commit_message or f"Upload {flags.directory.absolute().name} with Acorn"
    try:
        sdk = SDK if flags.space else None
        pushed = send(files, flags.repo_id, message, flags.private or None, flags.revision, sdk)
    except HUB_ERRORS as error:
        raise UserError(f"push to {flags.repo_id}: {why_push_failed(error, flags.repo_id)}") from error
    print(pushed.address)
    if flags.space:
        print("The Hub installs it now; in some minutes the page is there.")
    elif not flags.revision:
        trust = ["--trust_remote_code"] * any(file.name.endswith(".py") for file in files)
        print(f"Next, here or anywhere:\n  {shell('acorn', 'generate', pushed.repo_id, *trust)}")


def summary(flags: argparse.Namespace, files: list[Upload]) -> str:
    """One line on what is about to be sent."""
    return f"{flags.directory} → {flags.repo_id}: {len(files)} files, {in_bytes(sum(file.size for file in files))}"


def listing(flags: argparse.Namespace, files: list[Upload], staying: list[Upload]) -> str:
    """Each file that would go up or stay, with its size and the reason, and the card's metadata for a last look."""
    where = (
        f"{'Space ' * flags.space}{flags.repo_id}, branch {flags.revision or 'main'}"
        + ", private if it is new" * flags.private
    )
    width = max(len(file.name) for file in files + staying)
    lines = [f"{flags.directory} → {where}"]
    for title, uploads in (("goes up:", files), ("stays:", staying)):
        rows = [f"  {file.name:<{width}}  {in_bytes(file.size):>7}  {file.why}" for file in uploads]
        lines += ["", title, *rows] if rows else []
    metadata = ModelCard(next(file.content.decode() for file in files if file.name == "README.md")).data
    lines += ["", "the card's metadata:", *(f"  {line}" for line in metadata.to_yaml().splitlines())]
    if metadata.license == NOT_CHOSEN:
        lines.append("Nobody may use weights without a licence: choose one with --license, such as apache-2.0.")
    return "\n".join([*lines, "", f"{summary(flags, files)}. Nothing was uploaded: leave out --dry_run to upload."])


def in_bytes(size: int) -> str:
    return tqdm.format_sizeof(size, "B")


if __name__ == "__main__":
    run_main(main)
