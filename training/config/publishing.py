"""What a recipe may say of the Hub: a repository, a token, a licence and languages, checked before a run begins."""

import re
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainingArguments

from ..system.errors import UserError, one_line, unknown

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
NO_TOKEN = f"no Hugging Face token: create one at {TOKENS_PAGE} with write access, then `hf auth login` or set HF_TOKEN"
NOT_CHOSEN = "unknown"
# The licence identifiers that the Hub knows: https://huggingface.co/docs/hub/repositories-licenses
LICENSES = tuple(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma other unknown
    """.split()
)


def is_hub_id(name: str | None) -> bool:
    """Whether a name can be a repository's id and is no path on this machine."""
    if not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_license(name: str | None) -> None:
    """Refuse a licence that the Hub would refuse, naming its nearest neighbour."""
    if name is not None and name not in LICENSES:
        raise unknown("license", name, LICENSES, "`other` is for what the Hub does not list.")


def check_language(codes: list[str]) -> None:
    """Refuse a language that is no code, as the Hub would."""
    for code in codes:
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual", str(code)):
            raise UserError(f"language={code!r}: give an ISO 639 code of two or three letters, such as en, or `code`")


def check_repo_id(repo_id: str) -> None:
    """Refuse what can be no repository's id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"REPO_ID {repo_id!r}: {one_line(error)}") from error


def check_hub_arguments(args: TrainingArguments) -> None:
    """Refuse a push that would fail after hours of training: to a repository that cannot be, or without a token."""
    if args.push_to_hub:
        check_repo_id(repo_of(args))
        if get_token() is None:
            raise UserError(f"push_to_hub: {NO_TOKEN}")


def repo_of(args: TrainingArguments) -> str:
    """The repository that a run pushes to: hub_model_id, or the name of its directory under the token's own name."""
    return args.hub_model_id or Path(args.output_dir).absolute().name
