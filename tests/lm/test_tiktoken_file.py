"""Llama 3's tokenizer.model beside tiktoken, and what it becomes for transformers."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from transformers import AutoTokenizer

from lm.errors import UserError
from lm.tokenizer import Tokenizer, load_tokenizer
from tests.support.texts import random_texts
from tests.support.tiny_tokenizers import LLAMA3_WORDS, make_tiktoken_file, write_json

NUM_TEXTS = 10_000
Figure = Callable[[str, object], None]


def tiktoken_reference(path: Path, tokenizer: Tokenizer, num_ranks: int) -> tiktoken.Encoding:
    lines = [line.split() for line in path.read_bytes().splitlines()]
    names = [tokenizer.backend.id_to_token(num_ranks + index) or "" for index in range(256)]
    return tiktoken.Encoding(
        "test",
        pat_str=LLAMA3_WORDS,
        mergeable_ranks={b64decode(token): int(rank) for token, rank in lines},
        special_tokens={name: num_ranks + index for index, name in enumerate(names)},
    )


def test_tiktoken_ids_and_text_equal_those_of_tiktoken(tmp_path: Path, figure: Figure) -> None:
    num_ranks = make_tiktoken_file(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    theirs = tiktoken_reference(tmp_path / "tokenizer.model", ours, num_ranks)
    different = 0
    for text in random_texts(NUM_TEXTS):
        expected = theirs.encode(text, allowed_special="all")
        ids = ours.encode(text, add_special_tokens=False)
        different += ids != expected or ours.decode(ids, skip_special_tokens=False) != theirs.decode(expected)
        assert ours.encode(text) == [num_ranks, *expected]
    figure("tiktoken's file: strings that differ from tiktoken", f"{different} of {NUM_TEXTS}")
    assert different == 0


def test_the_special_tokens_of_llama_3_follow_the_ranks(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    first = make_tiktoken_file(tmp_path / "original" / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    names = [tokenizer.backend.id_to_token(first + index) for index in (0, 1, 4, 6, 7, 8, 9, 10, 11, 255)]
    assert names == [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>"),
        *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
        *("<|reserved_special_token_2|>", "<|reserved_special_token_246|>"),
    ]
    assert tokenizer.vocab_size == first + 256
    assert tokenizer.bos_token_id == first
    assert tokenizer.eos_token_ids == (first + 1, first + 9, first + 8)
    assert tokenizer.origin == "original/tokenizer.model (tiktoken)"
    assert tokenizer.decode(tokenizer.encode("<|eot_id|>Hi")) == "Hi"


def test_names_that_the_settings_give_to_special_tokens_win(tmp_path: Path) -> None:
    first = make_tiktoken_file(tmp_path / "tokenizer.model")
    declared = {str(first + 5): {"content": "<|reserved_special_token_2|>"}, str(first + 12): {"content": "<|tool|>"}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": declared, "eos_token": "<|eot_id|>"})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|reserved_special_token_2|><|tool|>") == [first, first + 5, first + 12]
    assert tokenizer.eos_token_ids == (first + 9, first + 8)
    assert tokenizer.vocab_size == first + 256


def test_an_exported_tiktoken_file_is_read_by_transformers_with_equal_ids(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "exported").mkdir()
    make_tiktoken_file(tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    exported = ours.tokenizer_json()
    assert exported is not None
    (tmp_path / "exported" / "tokenizer.json").write_text(exported, encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **ours.special_tokens}
    write_json(tmp_path / "exported" / "tokenizer_config.json", settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    texts = random_texts(NUM_TEXTS)
    ids = theirs(texts)["input_ids"]
    different = sum(ours.encode(text) != expected for text, expected in zip(texts, ids, strict=True))
    figure("tiktoken's file, exported: strings that differ in transformers", f"{different} of {NUM_TEXTS}")
    assert different == 0


def test_transformers_reads_the_file_with_equal_ids_but_without_special_tokens(tmp_path: Path, figure: Figure) -> None:
    num_ranks = make_tiktoken_file(tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == num_ranks
    texts = [text for text in random_texts(NUM_TEXTS) if "<|" not in text]
    ids = theirs(texts)["input_ids"]
    different = sum(ours.encode(text) != [num_ranks, *expected] for text, expected in zip(texts, ids, strict=True))
    figure(
        "tiktoken's file in transformers: strings without special tokens that differ", f"{different} of {len(texts)}"
    )
    assert different == 0


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda lines: lines[:-3] + lines[-1:], r"its 479 ranks must be 0 to 478, each once: lines are missing"),
        (lambda lines: [*lines[:9], b"IQ== 9", *lines[10:]], r"line 10: the token b'!' stands there twice"),
        (
            lambda lines: [*lines[:9], b"SGVsbG8 9", *lines[10:]],
            r"line 10 must be a base64 token .* \(got b'SGVsbG8 9'",
        ),
        (lambda lines: [*lines[:9], b"SGVsbG8= -9", *lines[10:]], r"line 10 must be a base64 token"),
        (lambda lines: [*lines[:9], b"<html>", *lines[10:]], r"line 10 must be a base64 token"),
        (lambda lines: [*lines, b"QUFB" * 400 + b" 481"], r"line 482 must be a base64 token of at most 1024 bytes"),
        (lambda lines: [b"SGVsbG8= 0"], r"256 of the 256 bytes have no token, the first is 0x00"),
    ],
)
def test_a_damaged_file_is_refused_with_the_line(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], reason: str
) -> None:
    path = tmp_path / "tokenizer.model"
    make_tiktoken_file(path)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(UserError, match=rf"not a complete tiktoken file: {reason}") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.param == "model"
