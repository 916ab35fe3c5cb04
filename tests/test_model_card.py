"""Model cards: metadata that the ecosystem's own classes and validators read back, and a body that claims no more."""

import json
import math
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from training.config.command_line import load_recipe
from training.config.publishing import is_hub_id
from training.config.recipe import RECIPES_DIR, load_recipe_file
from training.data.sources import PYTHON_STDLIB
from training.share.hub import finish_card
from training.share.model_card import CardFacts, model_card, write_card
from training.share.report import facts_of
from training.system.errors import UserError

from .hub_server import card_errors
from .tiny_runs import checkpoints, grow, metrics
from .variants import random_model, tiny_config

FACTS = CardFacts(
    "my model",
    "A test.",
    license="mit",
    language=["en", "code"],
    base_model="openai-community/gpt2",
    datasets=["roneneldan/TinyStories", "/home/me/text"],
    text="TinyStories",
    metrics={"loss": 1.25, "perplexity": math.exp(1.25), "bits_per_byte": 0.9, "token_accuracy": 0.5, "shift": 2.0},
    metrics_before={"loss": 2.5},
    command="acorn finetune x",
    sample="Once upon\na time",
    limits=["It is a test."],
)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return grow(tmp_path_factory.mktemp("card"), "--license", "apache-2.0", "--language", "en")


def test_the_metadata_round_trips_through_the_hubs_classes() -> None:
    text = model_card(FACTS)
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    data = card.data.to_dict()
    assert {key: data[key] for key in ("license", "language", "library_name", "pipeline_tag", "datasets")} == {
        "license": "mit",
        "language": ["en", "code"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "datasets": ["roneneldan/TinyStories"],
    }
    assert (data["base_model"], data["base_model_relation"]) == ("openai-community/gpt2", "finetune")
    assert card_errors(text) == []


def test_the_model_index_holds_the_measured_metrics() -> None:
    card = ModelCard(model_card(FACTS))
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"loss": 1.25, "perplexity": 3.490343, "bits_per_byte": 0.9, "accuracy": 0.5, "shift": 2.0}
    assert {result.dataset_type for result in card.data.eval_results} == {"roneneldan/TinyStories"}
    index = eval_results_to_model_index("my model", card.data.eval_results)
    assert index == card.data.to_dict()["model-index"]
    json.dumps(index)  # numbers and words, nothing that only Python knows


def test_what_is_no_number_stays_out_of_the_model_index() -> None:
    text = model_card(CardFacts("m", "A test.", metrics={"loss": float("inf"), "perplexity": None}))
    assert "model-index" not in ModelCard(text).data.to_dict()
    assert card_errors(text) == []


def test_the_body_says_how_it_was_made_and_what_it_cannot() -> None:
    body = ModelCard(model_card(FACTS)).text
    assert "| before | 2.5000 | – | – | – | – |" in body
    assert "| after | 1.2500 | 3.490 | 0.9000 | 0.5000 | 2.0000 |" in body
    assert "```bash\nacorn finetune x\n```" in body
    assert "torch " in body.split("## Training")[1]
    assert "- It is a test.\n" in body.split("## Limits")[1]
    assert "    Once upon\n    a time" in body


def test_code_is_trusted_only_where_the_directory_brings_it() -> None:
    assert "trust_remote_code" not in model_card(FACTS)
    assert "trust_remote_code=True" in model_card(CardFacts("m", "A test.", needs_remote_code=True))


def test_an_adapter_loads_through_peft() -> None:
    text = model_card(CardFacts("m", "A test.", library_name="peft", base_model="gpt2"))
    assert "AutoPeftModelForCausalLM.from_pretrained(name)" in text
    assert ModelCard(text).data.library_name == "peft"


def test_a_licence_that_nobody_chose_is_called_unknown() -> None:
    text = model_card(CardFacts("m", "A test."))
    assert ModelCard(text).data.license == "unknown"
    assert "Nobody has chosen a licence" in text
    assert "Nobody has chosen a licence" not in model_card(FACTS)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"license": "apache2"}, "did you mean 'apache-2.0'"),
        ({"language": ["english"]}, "language='english'"),
    ],
)
def test_metadata_that_the_hub_would_refuse(facts: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model_card(CardFacts("m", "A test.", **facts))


def test_a_path_is_no_hub_id(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "training").mkdir()
    assert is_hub_id("gpt2") and is_hub_id("me/gpt")
    assert not any(map(is_hub_id, [None, "", str(tmp_path), "a/b/c", "../x", "training"]))


def test_a_card_is_written_whole(tmp_path) -> None:
    write_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == model_card(FACTS)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_card_of_a_run(run) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    assert card_errors(text) == []
    card = ModelCard(text)
    best = min(metrics(run), key=lambda row: row["eval_loss"])
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["loss"] == pytest.approx(best["eval_loss"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(best["eval_loss"]), rel=1e-5)
    assert found["accuracy"] == pytest.approx(best["token_accuracy"], abs=1e-6)
    assert (card.data.license, card.data.language, card.data.datasets) == ("apache-2.0", ["en"], None)
    assert "trust_remote_code=True" in card.text
    assert "Licence of the text: not known" in card.text


def test_the_card_of_a_checkpoint_has_its_own_figures(run) -> None:
    first = checkpoints(run)[0]
    facts = facts_of(run / f"checkpoint-{first}")
    assert facts.metrics["loss"] == next(row["eval_loss"] for row in metrics(run) if row["step"] == first)
    assert facts.sample == ""


def test_a_licence_is_refused_before_training(tmp_path) -> None:
    with pytest.raises(UserError, match="unknown license 'gpl3'"):
        grow(tmp_path, "--license", "gpl3")
    assert not (tmp_path / "run").exists()


def test_the_language_is_the_texts(tmp_path) -> None:
    """The recipe's language is that of its own text; a text that a flag names has the flag's language, or none."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"data: {{dataset: {PYTHON_STDLIB}}}\ncard: {{language: [code], license: mit}}\n")
    assert load_recipe("pretrain", [str(path)]).card == {"language": ["code"], "license": "mit"}
    assert load_recipe("pretrain", [str(path), "--text_files", "x"]).card == {"license": "mit"}
    argv = [str(path), "--text_files", "x", "--language", "de"]
    assert load_recipe("pretrain", argv).card == {"license": "mit", "language": ["de"]}


def test_every_shipped_recipe_names_its_language() -> None:
    recipes = {path.stem: load_recipe_file(path.stem) for path in RECIPES_DIR.glob("*.yaml")}
    assert {name for name, recipe in recipes.items() if not recipe.card_arguments().language} == set()


def test_a_bare_model_claims_nothing(tmp_path) -> None:
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path / "bare")
    facts = facts_of(tmp_path / "bare")
    assert f"{model.num_parameters():,} parameters" in facts.about
    assert facts.needs_remote_code and not facts.metrics
    assert card_errors(model_card(facts)) == []


# what a push does to a card that is already there


def test_a_card_that_somebody_wrote_stays_as_it_is_but_for_what_the_hub_needs() -> None:
    text = finish_card("---\ncustom: 3\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    card = ModelCard(text)
    assert (card.data.license, card.data["custom"], card.data.library_name) == ("mit", 3, "transformers")
    assert card.text.strip() == "# Mine\n\nMy words."
    assert ModelCard(finish_card(text, license="gpl-3.0")).data.license == "gpl-3.0"
    assert card_errors(finish_card("# No metadata\n")) == []


def test_an_adapters_card_names_its_base_and_no_path(tmp_path) -> None:
    peft = (
        f"---\nbase_model: {tmp_path}\nlibrary_name: peft\ntags:\n- base_model:adapter:{tmp_path}\n- lora\n---\n# x\n"
    )
    card = ModelCard(finish_card(peft, base_model="me/base", is_adapter=True))
    assert (card.data.base_model, card.data["base_model_relation"], card.data.tags) == ("me/base", "adapter", ["lora"])
    assert str(tmp_path) not in str(card)


def test_a_sharded_model_is_counted_whole(tmp_path) -> None:
    model = random_model(tiny_config())
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert f"{model.num_parameters():,} parameters" in facts_of(tmp_path / "sharded").about


@pytest.mark.parametrize("text", ["---\n- a list\n---\n", "---\na: [\n---\n"])
def test_metadata_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match=r"README\.md"):
        finish_card(text)
