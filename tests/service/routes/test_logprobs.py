from __future__ import annotations

import math
from pathlib import Path

import pytest

from lm.token_bytes import TokenBytes, token_bytes
from lm.tokenizer import Tokenizer, load_tokenizer
from service.engine.messages import Logprobs
from service.routes.logprobs import LEAST, TextOffsets, chat_logprobs, prompt_logprobs, prompt_offsets, text_logprobs
from tests.support.tiny_tokenizers import STYLES, make_sentencepiece, write_tokenizer

TEXT = "Hello, world! 你好 \U0001f6f8 e\u0301 end"
UNLIKELY = Logprobs(logprob=-math.inf, top_ids=(5,), top_logprobs=(-math.inf,), rank=600)


@pytest.fixture(params=[*STYLES, "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        make_sentencepiece(tmp_path / "tokenizer.model")
    else:
        write_tokenizer(tmp_path, request.param)
    return load_tokenizer(tmp_path)


@pytest.fixture
def bytes_of(tokenizer: Tokenizer) -> TokenBytes:
    return token_bytes(tokenizer)


def test_a_prompts_tokens_stand_where_their_text_does_with_and_without_a_bos(
    tokenizer: Tokenizer, bytes_of: TokenBytes
) -> None:
    for add_special_tokens in (False, True):
        ids = tokenizer.encode(TEXT, add_special_tokens=add_special_tokens)
        places = prompt_offsets(bytes_of, ids, TEXT)
        assert places[0] == 0
        assert places == sorted(places)
        for token_id, place in zip(ids, places, strict=True):
            text = bytes_of.text(token_id)
            if "\ufffd" not in text and token_id not in bytes_of.special and place:
                assert TEXT[place:].startswith(text)


def test_all_tokens_of_a_character_stand_where_it_does(bytes_of: TokenBytes, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f9ff!", add_special_tokens=False)
    parts = [token_id for token_id in ids if "\ufffd" in bytes_of.text(token_id)]
    assert len(parts) > 1, "the tokenizer has a token for this character, so this shows nothing"
    offsets = TextOffsets(bytes_of, shows_special=False)
    places = [offsets.add(token_id) for token_id in parts]
    assert places == [0] * len(parts)
    assert offsets.position == 1


def test_special_tokens_take_no_room_unless_they_are_shown(bytes_of: TokenBytes, tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_token_ids[0]
    for shown in (False, True):
        offsets = TextOffsets(bytes_of, shows_special=shown)
        offsets.add(end)
        assert offsets.position == (len(bytes_of.text(end)) if shown else 0)


def test_no_probability_is_a_number_that_json_has(bytes_of: TokenBytes) -> None:
    legacy = text_logprobs(bytes_of, [5, 6], [UNLIKELY, UNLIKELY], [0, 1], 1)
    assert legacy["token_logprobs"] == [LEAST, LEAST]
    assert {value for top in legacy["top_logprobs"] for value in top.values()} == {LEAST}
    (entry,) = chat_logprobs(bytes_of, [6], [UNLIKELY], 1)
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == LEAST
    _, of_second = prompt_logprobs(bytes_of, [5, 6], [UNLIKELY], 1)
    assert of_second is not None
    assert {item["logprob"] for item in of_second.values()} == {LEAST}
