"""Addresses without secrets, in names, in commands and in errors."""

import pytest

from training.config.recipe import Recipe, load_recipe_file
from training.resume import give_addresses_again
from training.share.report import sources_of
from training.system.addresses import each_text, public_name, public_text
from training.system.errors import UserError


@pytest.mark.parametrize(
    ("given", "public"),
    [
        ("http://h.org/x.txt?token=S", "http://h.org/x.txt"),
        ("https://user:S@h.org/x.txt", "https://h.org/x.txt"),
        ("https://S@h.org:80/x.txt#S", "https://h.org:80/x.txt"),
        ("HTTPS://me:S@S@h.org/x y.txt?a=S S", "HTTPS://h.org/x y.txt"),
        ("https://h.org/x?a='S'&b=\"S\"", "https://h.org/x"),
        ("https://h.org/@someone/x.txt", "https://h.org/@someone/x.txt"),
        ("/here/http:/me:S@h.org/x?S", "/here/http:/h.org/x"),
        ("texts/what?.txt", "texts/what?.txt"),
        ("C:/me@home/x.txt", "C:/me@home/x.txt"),
        ("a@b.txt", "a@b.txt"),
    ],
)
def test_an_address_loses_what_may_be_secret(given: str, public: str) -> None:
    assert public_name(given) == public_name(public) == public


def test_texts_errors_and_commands_lose_it_too() -> None:
    text = "acorn x --text_files 'https://a:S@h/x?k=S' b --data_files=s3://k:S@h/y 'https://h/z?S#S'"
    assert public_text(text) == "acorn x --text_files 'https://h/x' b --data_files=s3://h/y 'https://h/z'"
    assert str(UserError("cannot read http://h/x?k=S now")) == "cannot read http://h/x now"
    assert each_text({"a": ["http://S@h/?S", {"b": 1}], "c": None}, public_name) == {
        "a": ["http://h/", {"b": 1}],
        "c": None,
    }


def test_an_error_of_a_data_loaders_worker_is_its_one_line() -> None:
    told = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    assert (
        str(UserError(f"{told}training.system.errors.UserError: a.bin: was 4 bytes long\n"))
        == "a.bin: was 4 bytes long"
    )


def test_a_saved_recipe_has_no_secrets_and_the_one_at_hand_keeps_them(tmp_path) -> None:
    mixture = [{"text_files": ["http://h/a?SECRET"], "weight": 1}, {"data_files": "http://SECRET@h/b.csv", "weight": 2}]
    recipe = Recipe(name="x", data={"mixture": mixture}, sample={"prompt": "http://h/a?kept"})
    recipe.command = "acorn pretrain x --text_files http://h/a?SECRET"
    recipe.save(tmp_path / "recipe.yaml")
    saved = (tmp_path / "recipe.yaml").read_text()
    assert "SECRET" not in saved and "http://h/a?kept" in saved
    assert load_recipe_file(str(tmp_path / "recipe.yaml")).data["mixture"][1]["data_files"] == "http://h/b.csv"
    assert recipe.data["mixture"][0]["text_files"] == ["http://h/a?SECRET"]
    assert sources_of(recipe) == ["http://h/a", "http://h/b.csv"]


def test_a_resume_takes_its_own_addresses_again_and_no_others() -> None:
    recipe = Recipe(name="x", data={"text_files": ["http://h/a", "b.txt"], "text_column": "text"})
    flags = {"text_files": ["http://h/a?SECRET", "b.txt"]}
    give_addresses_again(recipe, flags)
    assert flags == {} and recipe.data["text_files"] == ["http://h/a?SECRET", "b.txt"]
    flags = {"text_files": ["http://h/other?SECRET", "b.txt"]}
    give_addresses_again(recipe, flags)
    assert flags
