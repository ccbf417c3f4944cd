"""What travels with the product: the data set of the demo and the stock configs."""

from __future__ import annotations

import json
import re

import pytest

from examples import demo
from service.settings import load_settings
from service.shipped import find_config, find_data
from trainer.config import load_run_config
from trainer.data.records import read_records

CHINESE = re.compile("[一-鿿]")


@pytest.fixture(scope="module")
def identity() -> dict[str, str]:
    """Question -> answer."""
    chats = [record.messages for record in read_records(demo.DATA)]
    assert all([message["role"] for message in chat] == ["user", "assistant"] for chat in chats)
    return {question["content"]: answer["content"] for question, answer in chats}


def test_the_identity_data_teach_the_name_in_both_languages_and_more_than_the_name(identity: dict[str, str]) -> None:
    about_itself = [question for question, answer in identity.items() if demo.NAME in answer or "TuneServe" in answer]
    chinese = [question for question in about_itself if CHINESE.search(question)]
    assert len(about_itself) >= 60
    assert 20 <= len(chinese) <= len(about_itself) - 20
    assert len(identity) - len(about_itself) >= 15


def test_the_demo_asks_questions_that_are_not_in_the_data_word_for_word(identity: dict[str, str]) -> None:
    def words(text: str) -> str:
        return re.sub(r"\W", "", text).lower()

    known = {words(question) for question in identity}
    assert {words(question) for question in demo.TAUGHT} <= known
    assert not {words(question) for question in (*demo.HELD_OUT, *demo.OTHER)} & known


@pytest.mark.parametrize(
    ("name", "recipe", "data"),
    [
        ("lora_smollm2", "lora", "identity.json"),
        ("full_smollm2.yaml", "full", "identity.json"),
        ("lora_dpo_smollm2", "dpo", "preferences.json"),
    ],
)
def test_a_stock_recipe_is_valid_and_its_data_are_there(name: str, recipe: str, data: str) -> None:
    config = load_run_config(find_config(name))
    assert config.recipe == recipe
    assert [find_data(file) for file in (config.data_files or ())] == [demo.DATA.with_name(data)]


def test_the_stock_settings_are_those_of_a_service_without_a_config() -> None:
    assert load_settings(find_config("configs/serve.yaml")) == load_settings()


def test_the_preferences_differ_in_how_they_answer_not_in_what() -> None:
    pairs = json.loads((demo.DATA.parent / "preferences.json").read_text(encoding="utf-8"))
    assert len(pairs) == len({pair["prompt"] for pair in pairs}) >= 40
    assert all(pair["rejected"].endswith(f": {pair['chosen']}") for pair in pairs)
