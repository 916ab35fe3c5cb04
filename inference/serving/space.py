"""The playground as a Space on the Hub: the page's own files, the model's, and an app that puts them together."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, SpaceCard, SpaceCardData

from training.config.publishing import NOT_CHOSEN
from training.data.tokenizers import load_tokenizer
from training.model.chat_template import end_of_turn
from training.model.loading import ADAPTER_CONFIG, OUR_TYPES, base_of, load_config, tokenizer_home
from training.model.sizes import context_of
from training.share.hub import SPACE_MODEL
from training.share.uploads import Upload
from training.system.errors import UserError
from training.system.files import read_json

SDK, GRADIO, PYTHON = "gradio", "6.31.0", "3.11"  # that the page was tested with
PAGE = ("page.py", "writing.py", "drawing.py", "page.css", "page.js")  # they import nothing of Acorn
DOCUMENTS = ("README.md", "recipe.yaml", "metrics.jsonl", "loss.png", "sample.txt")  # which no model needs to run

APP = '''\
"""A page to write and talk with the model of this Space, and to see what it holds likely."""

import torch
{imports}

from playground.page import Writer, build_page, open_page

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = "auto" if device == "cuda" else torch.float32  # many processors only emulate the shorter ones
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
model = {loader}.from_pretrained({folder!r}, dtype=dtype{trust}).to(device).eval()
page = build_page(Writer(model, tokenizer, context={context}, more_ends={ends}), {name!r})
open_page(page)
page.block_thread()
'''
ABOUT = """
A page to write with the language model in `model/`: how likely each token was, what else was likely, and what the
model looked at. Made with Acorn.
"""


def space_files(directory: Path, files: list[Upload], repo_id: str) -> list[Upload]:
    """What a Space of the model or adapter in `directory` is made of; files: its own as they are sent to the Hub."""
    sent, name, here = {file.name: file for file in files}, repo_id.split("/")[-1], Path(__file__).parent
    if ADAPTER_CONFIG in sent:
        adapter_settings(sent)
    card = space_card(name, ModelCard(sent["README.md"].content.decode()).data)
    made = [
        Upload("README.md", card.encode(), "the Space's settings and what it is"),
        Upload("app.py", app(directory, sent, name).encode(), "loads the model and opens the page"),
        Upload("requirements.txt", requirements(sent).encode(), "what the Space installs"),
        *(Upload(f"playground/{file}", here / file, "the page") for file in PAGE),
        *(dataclasses.replace(file, name=f"{SPACE_MODEL}/{file.name}") for file in files if file.name not in DOCUMENTS),
    ]
    return sorted(made, key=lambda file: file.name)


def space_card(name: str, card: ModelCardData) -> str:
    """The Space's README: its settings for the Hub, and a sentence."""
    license = card.license if card.license != NOT_CHOSEN else None
    data = SpaceCardData(
        title=name,
        emoji="🌱",
        colorFrom="green",
        colorTo="yellow",
        sdk=SDK,
        sdk_version=GRADIO,
        python_version=PYTHON,
        app_file="app.py",
        license=license,
        models=[card.base_model] if isinstance(card.base_model, str) else None,
    )
    return SpaceCard(f"---\n{data.to_yaml()}\n---\n\n# {name}\n{ABOUT}").content


def app(directory: Path, sent: dict[str, Upload], name: str) -> str:
    """The Space's app.py, which loads what was `sent`."""
    is_base = ADAPTER_CONFIG not in sent
    config = read_json(directory / "config.json") if is_base else load_config(base_of(directory)).to_dict()
    has_code = any(file.endswith(".py") for file in sent) or config.get("model_type") in OUR_TYPES
    loader, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if not is_base:
        loader = "AutoPeftModelForCausalLM"
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    home = SPACE_MODEL if "tokenizer_config.json" in sent else adapter_settings(sent)["base_model_name_or_path"]
    end = end_of_turn(load_tokenizer(tokenizer_home(str(directory)), needs_end_of_text=False))
    return APP.format(
        imports=imports,
        tokenizer=home,
        loader=loader,
        folder=SPACE_MODEL,
        trust=", trust_remote_code=True" * has_code,
        context=context_of(config),
        ends=[] if end is None else [end],
        name=name,
    )


def requirements(sent: dict[str, Upload]) -> str:
    """What the Space installs beside gradio: the versions that the model was tried with here."""
    packages = ["transformers", "tokenizers", *(["peft"] if ADAPTER_CONFIG in sent else [])]
    return "".join(f"{line}\n" for line in ["torch>=2.11", *(f"{package}=={version(package)}" for package in packages)])


def adapter_settings(sent: dict[str, Upload]) -> dict:
    """The adapter's configuration as it is sent; refuses one that transformers and PEFT alone cannot write with."""
    settings = json.loads(sent[ADAPTER_CONFIG].content)
    if settings.get("num_virtual_tokens"):
        kind = settings.get("peft_type")
        raise UserError(f"--space: a Space has no place for the virtual tokens of {kind}; take another adapter")
    return settings
