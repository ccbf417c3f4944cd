"""Text from every kind of tokenizer, token by token: never half a character, and together what the whole is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.token_bytes import token_bytes
from lm.tokenizer import Tokenizer, load_tokenizer
from service.decoders import Decoders
from service.detokenizer import ByteDecoder
from tests.support.tiny_tokenizers import STYLES, make_sentencepiece, make_tiktoken_file, write_tokenizer

BYTE_LEVEL = ("smollm2", "llama3", "tiktoken")
KINDS = (*STYLES, "tiktoken", "bpe", "unigram")
TEXTS = [
    "你是谁？我是小鸣。",
    "naïve café 👩‍👩‍👧 done",
    "🙂🙃🙂",
    "e\u0301a\u0308 नमस्ते กำ",  # combining marks
    "a\ufffdb",
    " leading and trailing ",
    "\n\n\ttabs\r\n",
    "𠜎𠜱 outside of the basic plane",
]
texts = st.sampled_from(TEXTS) | st.text(max_size=30) | st.text(" ab是🙂\u0301", max_size=30)


@dataclass(frozen=True, slots=True)
class Kind:
    tokenizer: Tokenizer
    decoders: Decoders

    def pieces(self, ids: list[int], *, skip: bool = True) -> list[str]:
        decoder = self.decoders.new(skip_special_tokens=skip)
        return [*map(decoder.add, ids), decoder.flush()]

    def whole(self, ids: list[int], *, skip: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip)


def load_kind(folder: Path, name: str) -> Kind:
    folder.mkdir(exist_ok=True)
    if name in STYLES:
        write_tokenizer(folder, name)
    elif name == "tiktoken":
        make_tiktoken_file(folder / "tokenizer.model")
    else:
        make_sentencepiece(folder / "tokenizer.model", name)  # type: ignore[arg-type]
    tokenizer = load_tokenizer(folder)
    return Kind(tokenizer, Decoders(tokenizer, token_bytes(tokenizer)))


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return load_kind(tmp_path_factory.mktemp("kind"), request.param)


@pytest.fixture(scope="module", params=BYTE_LEVEL)
def byte_level(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kind:
    return load_kind(tmp_path_factory.mktemp("kind"), request.param)


@given(first=texts, second=texts, num_special=st.integers(0, 3), skip=st.booleans())
def test_the_pieces_together_are_the_whole_text(
    kind: Kind, first: str, second: str, num_special: int, skip: bool
) -> None:
    special = list(kind.tokenizer.eos_token_ids[:1]) * num_special
    ids = kind.tokenizer.encode(first) + special + kind.tokenizer.encode(second)
    assert "".join(kind.pieces(ids, skip=skip)) == kind.whole(ids, skip=skip)


@given(text=texts)
def test_no_piece_holds_half_a_character(kind: Kind, text: str) -> None:
    ids = kind.tokenizer.encode(text)
    if "\ufffd" not in kind.whole(ids):
        assert not any("\ufffd" in piece for piece in kind.pieces(ids))


@given(data=st.data())
def test_tokens_that_are_bytes_join_to_the_whole_whatever_they_are(byte_level: Kind, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, byte_level.tokenizer.vocab_size - 1), max_size=60))
    for skip in (False, True):
        assert "".join(byte_level.pieces(ids, skip=skip)) == byte_level.whole(ids, skip=skip)


def test_tokens_that_are_bytes_are_not_decoded_again_and_again(byte_level: Kind) -> None:
    assert isinstance(byte_level.decoders.new(skip_special_tokens=True), ByteDecoder)


def test_a_character_comes_with_its_last_byte_and_not_later(byte_level: Kind) -> None:
    """Also where a replacement character was meant: that is one, and no sign of a broken one."""
    letters = byte_level.tokenizer.encode("龘\ufffd龘", add_special_tokens=False)
    assert [piece for piece in byte_level.pieces(letters) if piece] == ["龘", "\ufffd", "龘"]


def test_ids_without_a_token_are_nothing(kind: Kind) -> None:
    beyond = kind.tokenizer.vocab_size + 7
    ids = kind.tokenizer.encode("ab", add_special_tokens=False)
    assert "".join(kind.pieces([beyond, *ids, beyond])) == kind.whole(ids)
