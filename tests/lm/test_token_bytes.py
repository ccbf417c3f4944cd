from __future__ import annotations

from pathlib import Path

import pytest

from lm.token_bytes import token_bytes
from lm.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_tokenizers import STYLES, make_sentencepiece, make_tiktoken_file, write_tokenizer

TEXT = "Hello  world 你好\n\U0001f6f8 e\u0301\x00 ÿ"


@pytest.fixture(params=[*STYLES, "sentencepiece", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        make_sentencepiece(tmp_path / "tokenizer.model")
    elif request.param == "tiktoken":
        make_tiktoken_file(tmp_path / "tokenizer.model")
    else:
        write_tokenizer(tmp_path, request.param)
    return load_tokenizer(tmp_path)


def test_the_bytes_of_all_tokens_together_are_the_text(tokenizer: Tokenizer) -> None:
    bytes_of = token_bytes(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(map(bytes_of, ids)).decode().lstrip(" ") == TEXT
    assert "�" in "".join(map(bytes_of.text, ids)), "the text has no character of several tokens"


def test_a_special_token_is_its_own_text(tokenizer: Tokenizer) -> None:
    bytes_of = token_bytes(tokenizer)
    for token_id in tokenizer.eos_token_ids:
        assert bytes_of.text(token_id) == tokenizer.decode([token_id], skip_special_tokens=False) != ""


def test_an_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert token_bytes(tokenizer)(10**6) == b""
