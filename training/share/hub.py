"""The way to the Hub: files as they are sent, one commit that holds them all, failures in words."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from ..config.publishing import NOT_CHOSEN, TOKENS_PAGE, check_license, is_hub_id
from ..system.errors import UserError, one_line
from ..system.files import read_json
from ..system.run_files import Use, kind_of
from .model_card import NAME_PLACEHOLDER
from .uploads import (
    Upload,
    portable_recipe,
    replace_paths,
    without_machine,
    without_paths,
)

HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)  # RuntimeError: what huggingface_hub wraps uploads in
SPACE_MODEL = "model"  # the folder of a Space that holds its model
# status of an answer: what it means
ANSWERS = {
    401: f"the Hub rejected the token (401): create one with write access at {TOKENS_PAGE}, then `hf auth login`",
    403: "{repo_id} belongs to someone else, or the token is read-only (403, {said}): push to one of your own, "
    f"or create a token with write access at {TOKENS_PAGE}",
    404: "{repo_id} was not found with this token (404): check the id and the branch, and whose the token is",
    None: "the Hub answered {status}: {said}; nothing is lost, push again later",
}


class Pushed(NamedTuple):
    """Where a push went: the repository's whole id and its address."""

    repo_id: str
    address: str


# ---- what goes up


def finish_files(
    directory: Path, going: list[Upload], card: str, license: str | None = None, base_model: str | None = None
) -> list[Upload]:
    """The files as they are sent: card with whole metadata, adapter with its base's id, nothing with local paths.

    card: the text of README.md. license, base_model: what the card and the adapter shall say instead of what they do.
    """
    files = {upload.name: without_machine(upload) for upload in going}
    recipe, paths = portable_recipe(directory)
    adapter = next((upload for upload in going if upload.name == "adapter_config.json"), None)
    if adapter:
        settings = read_json(adapter.content)
        known_as = str(settings.get("base_model_name_or_path"))
        base_model = base_model or known_as
        if not is_hub_id(base_model):
            raise UserError(
                f"base_model={base_model!r}: the adapter's base is a directory of this machine, which nobody else "
                "has; push it too, and name its repository with --base_model"
            )
        text = json.dumps(without_paths(settings) | {"base_model_name_or_path": base_model}, indent=2)
        files[adapter.name] = dataclasses.replace(adapter, content=text.encode())
        if not is_hub_id(known_as):
            card = card.replace(known_as, base_model)  # a path says nothing to others
    text = finish_card(replace_paths(card, paths), license, base_model, is_adapter=adapter is not None)
    files["README.md"] = Upload("README.md", text.encode(), "model card")
    if "recipe.yaml" in files:
        files["recipe.yaml"] = dataclasses.replace(files["recipe.yaml"], content=recipe)
    return [files[name] for name in sorted(files)]


def finish_card(text: str, license: str | None = None, base_model: str | None = None, is_adapter: bool = False) -> str:
    """The card with metadata that the Hub will take.

    Raises UserError for metadata that cannot be read, or a licence that the Hub does not know.
    """
    try:
        card = ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"README.md: the metadata on top cannot be read: {one_line(error)}") from error
    card.data.license = license or card.data.license or NOT_CHOSEN
    if isinstance(card.data.license, str):
        check_license(card.data.license)
    card.data.pipeline_tag = card.data.pipeline_tag or "text-generation"
    card.data.library_name = "peft" if is_adapter else card.data.library_name or "transformers"
    if base_model and not is_hub_id(base_model):
        raise UserError(f"base_model={base_model!r}: name a repository on the Hub, not a directory of this machine")
    if base_model:
        card.data.base_model = base_model
    elif isinstance(card.data.base_model, str) and not is_hub_id(card.data.base_model):
        card.data.base_model = None  # a path of this machine, which the Hub's validator refuses
    if is_adapter:
        card.data["base_model_relation"] = "adapter"
    # PEFT tags an adapter with the place of its base, which may be a path; the Hub finds the base out by itself.
    card.data.tags = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")] or None
    return card.content


# ---- sending it


def send(
    files: list[Upload],
    repo_id: str,
    message: str,
    private: bool | None = None,
    revision: str | None = None,
    space_sdk: str | None = None,
) -> Pushed:
    """Make the repository, and the branch, where they are not there yet, and commit all files at once.

    space_sdk: what a Space runs on, whose model lies in SPACE_MODEL; None for a model. Weights there that are not among
    the files are removed in the same commit, so that no loader finds them instead. Raises one of HUB_ERRORS, for
    `why_push_failed`, and UserError where `private` cannot be had.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()  # huggingface_hub draws some of them into files too
    api = HfApi(token=get_token())
    kind = {"repo_type": "space" if space_sdk else "model"}
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True, space_sdk=space_sdk, **kind).repo_id
    address = f"{constants.ENDPOINT}/{'spaces/' if space_sdk else ''}{repo_id}"
    if private and not api.repo_info(repo_id, **kind).private:
        where = f"{address}/settings"
        raise UserError(f"private: {repo_id} exists and is public; a push does not change that, do it at {where}")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True, **kind)
    for file in files:  # the card names the repository where it says how to load the model
        if file.name == "README.md" and isinstance(file.content, bytes):
            file.content = file.content.replace(NAME_PLACEHOLDER.encode(), repo_id.encode())
    operations: list = [CommitOperationAdd(file.name, file.content) for file in files]
    there = set(api.list_repo_files(repo_id, revision=revision, **kind)) - {file.name for file in files}
    folder = f"{SPACE_MODEL}/" if space_sdk else ""
    own = {name: name.removeprefix(folder) for name in there if name.startswith(folder)}
    stale = [name for name, own_name in own.items() if "/" not in own_name and Use.WEIGHTS in kind_of(own_name)[1]]
    operations += [CommitOperationDelete(name) for name in stale]
    api.create_commit(repo_id, operations, commit_message=message, revision=revision, **kind)
    return Pushed(repo_id, address + (f"/tree/{revision}" if revision else ""))


def why_push_failed(error: BaseException, repo_id: str) -> str:
    """One line on why a push failed, and what to do."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    offline, unreachable, answered = (
        next((e for e in chain if isinstance(e, kind)), None)
        for kind in (OfflineModeIsEnabled, HTTPError, HfHubHTTPError)
    )
    if offline is not None:
        return "HF_HUB_OFFLINE is set, so nothing reaches the Hub: unset it, and push again"
    if unreachable is not None and answered is None:
        return f"{constants.ENDPOINT} cannot be reached ({one_line(unreachable)}): nothing is lost, push again later"
    if answered is None or (isinstance(error, ValueError) and str(error).startswith("Invalid metadata")):
        return " ".join(str(error).split())[:300] or type(error).__name__  # it names the field of the card
    status = answered.response.status_code
    said = " ".join((answered.server_message or answered.response.reason_phrase).split())[:200]
    return ANSWERS.get(status, ANSWERS[None]).format(repo_id=repo_id, status=status, said=said)
