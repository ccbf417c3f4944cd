"""SentencePiece's tokenizer.model beside sentencepiece itself, and beside transformers' reading of it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from lm.errors import UserError
from lm.tokenizer import load_tokenizer
from tests.support.texts import random_texts
from tests.support.tiny_tokenizers import make_sentencepiece, write_json

NUM_TEXTS = 10_000
Figure = Callable[[str, object], None]

VARIANTS: dict[str, dict[str, Any]] = {
    "BPE of Llama 2": {"model_type": "bpe"},
    "unigram": {"model_type": "unigram"},
    "unigram, NFKC, no bytes": {
        "model_type": "unigram",
        "byte_fallback": False,
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
        "control_symbols": ["<|im_start|>"],
        "user_defined_symbols": ["<|im_end|>", "def"],
    },
    "BPE without prefix space": {"model_type": "bpe", "add_dummy_prefix": False},
}


def load_reference(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def split(text: str, specials: list[str]) -> list[str]:
    return [part for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text) if part]


@pytest.mark.parametrize("variant", VARIANTS)
def test_sentencepiece_ids_and_text_equal_those_of_sentencepiece(tmp_path: Path, variant: str, figure: Figure) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model", **VARIANTS[variant])
    ours, theirs = load_tokenizer(tmp_path), load_reference(tmp_path)
    specials = ["<unk>", "<s>", "</s>", *VARIANTS[variant].get("control_symbols", [])]
    different = 0
    for text in random_texts(NUM_TEXTS):
        parts = [([theirs.piece_to_id(p)] if p in specials else theirs.encode(p)) for p in split(text, specials)]
        expected = [token for part in parts for token in part]
        ids = ours.encode(text, add_special_tokens=False)
        different += ids != expected or ours.decode(ids) != theirs.decode(expected)
        assert ours.encode(text) == [1, *expected]
    figure(f"SentencePiece ({variant}): strings that differ from sentencepiece", f"{different} of {NUM_TEXTS}")
    assert different == 0


def test_decoding_with_special_tokens_gives_the_text_back(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model")
    for legacy in (True, False):
        write_json(
            tmp_path / "tokenizer_config.json", {"legacy": legacy, "additional_special_tokens": ["<|im_start|>"]}
        )
        tokenizer = load_tokenizer(tmp_path)
        specials = ["<unk>", "<s>", "</s>", "<|im_start|>"]
        for text in random_texts(500):
            parts = split(text.replace("▁", " "), specials)
            spaced = (
                " " + part if legacy and index and part not in specials else part for index, part in enumerate(parts)
            )
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == (
                "".join(spaced)
            )


def test_the_prefix_space_stands_behind_special_tokens_in_legacy_models_only(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    hello, spaced = (tokenizer.backend.token_to_id(piece) for piece in ("He", "▁Hello"))
    assert tokenizer.encode("</s>Hello") == [1, 2, spaced]
    assert tokenizer.decode([1, spaced]) == "Hello"  # type: ignore[list-item]
    assert tokenizer.decode([1, spaced], skip_special_tokens=False) == "<s> Hello"  # type: ignore[list-item]
    write_json(tmp_path / "tokenizer_config.json", {"legacy": False})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("</s>Hello")[:3] == [1, 2, hello]
    assert tokenizer.encode("Hello") == [1, spaced]


def test_bos_and_eos_stand_around_raw_text_as_the_settings_say(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model")
    plain = load_tokenizer(tmp_path).encode("Hello", add_special_tokens=False)
    for settings, before, after in (
        ({}, [1], []),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "add_eos_token": True, "eos_token": "<|x|>"}, [1], [600]),
    ):
        write_json(tmp_path / "tokenizer_config.json", settings)
        assert load_tokenizer(tmp_path).encode("Hello") == [*before, *plain, *after]
        assert load_tokenizer(tmp_path).encode("Hello", add_special_tokens=False) == plain


ADDED = {"content": "<|new|>", "lstrip": True, "rstrip": True, "special": True}


@pytest.mark.parametrize(
    ("files", "new_id"),
    [
        ({"added_tokens.json": {"<|new|>": 605}}, 605),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"605": ADDED, "2": {"content": "</s>"}}}}, 605),
        ({"tokenizer_config.json": {"pad_token": "<|new|>"}}, 600),
        ({"special_tokens_map.json": {"additional_special_tokens": ["</s>", "<|new|>"]}}, 600),
    ],
)
def test_tokens_added_beside_the_model_are_found_and_written(
    tmp_path: Path, files: dict[str, Any], new_id: int
) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model")
    for name, content in files.items():
        write_json(tmp_path / name, content)
    tokenizer = load_tokenizer(tmp_path)
    text = "Hello  <|new|>  你</s>"
    ids, ends = tokenizer.encode_with_ends(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(new_id) == 1
    assert ids[-1] == 2
    assert tokenizer.vocab_size == 601
    assert tokenizer.backend.last_id == new_id
    swallows = "added_tokens_decoder" in str(files)
    assert ends[ids.index(new_id)] == len("Hello  <|new|>") + (2 if swallows else 0)
    shown = "Hello<|new|> 你</s>" if swallows else "Hello  <|new|>   你</s>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == shown
    special = "added_tokens.json" not in files
    assert ("<|new|>" in tokenizer.decode([*ids, 604, 99_999])) != special


def test_tokens_without_a_character_of_their_own_end_with_the_next_one(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model", model_type="unigram")
    tokenizer = load_tokenizer(tmp_path)
    ids, ends = tokenizer.encode_with_ends("H鑫</s>b🤖")
    pieces = [tokenizer.backend.id_to_token(token) for token in ids]
    assert pieces == [
        *("▁", "H", "<0xE9>", "<0x91>", "<0xAB>", "</s>", "▁", "b"),
        *("<0xF0>", "<0x9F>", "<0xA4>", "<0x96>"),
    ]
    assert ends == [1, 1, 2, 2, 2, 6, 7, 7, 8, 8, 8, 8]


@pytest.mark.parametrize("legacy", [True, False])
def test_transformers_differs_from_sentencepiece_only_in_front_of_spaces(
    tmp_path: Path, legacy: bool, figure: Figure
) -> None:
    """Transformers 5 adds no prefix space where there is a space (or U+2581) already; sentencepiece, and we, do."""
    make_sentencepiece(tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, **names}
    write_json(tmp_path / "tokenizer_config.json", settings)
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    different = unexplained = 0
    for text in random_texts(NUM_TEXTS):
        ids, expected = ours.encode(text), theirs(text)["input_ids"]
        different += ids != expected
        in_front = any(part[0] in " ▁" for part in split(text, ["<s>", "</s>", "<unk>"]))
        unexplained += ids != expected and not in_front
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    figure(
        f"SentencePiece (legacy={legacy}) in transformers: strings that differ",
        f"{different} of {NUM_TEXTS}, {unexplained} of them elsewhere than before a space",
    )
    assert unexplained == 0


# ---- refusals


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-5], lambda data: b"\xff" * 99])
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "tokenizer.model"
    make_sentencepiece(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"tokenizer\.model is not a tokenizer file: it is neither") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.param == "model"


def test_no_damage_to_a_model_makes_anything_but_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    make_sentencepiece(path)
    whole = path.read_bytes()
    rng = random.Random(5)
    refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            tokenizer = load_tokenizer(tmp_path)
            tokenizer.decode(tokenizer.encode("Hello 你 🤖"))
        except UserError:
            refused += 1
    assert refused > 50


def test_an_added_token_with_an_id_below_zero_is_refused(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model")
    write_json(tmp_path / "added_tokens.json", {"<|x|>": -1})
    with pytest.raises(UserError, match=r"'<\|x\|>' has the id -1; ids begin at 0"):
        load_tokenizer(tmp_path)
