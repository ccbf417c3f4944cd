from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from lm.tokenizer import Tokenizer, load_tokenizer
from service.detokenizer import MAX_PENDING, Detokenizer, IncrementalDecoder, StopFinder
from tests.support.tiny_tokenizers import STYLES, write_tokenizer

TEXTS = ["你是谁？我是小鸣。", "naïve café 👩‍👩‍👧 done", "🙂🙃🙂", "a�b", "", " leading and trailing ", "\n\n"]


def byte_level() -> tokenizers.Tokenizer:
    """Each of the 256 bytes is a token, some of their merges are, and one special token decodes to nothing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    merges = [(text[0], text[1]) for text in (spell(pair)[0][0] for pair in ("é", "ab", "lo"))]
    vocab = {token: index for index, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend


BYTE_LEVEL = byte_level()
END = BYTE_LEVEL.token_to_id("<|end|>")
token_ids = st.integers(0, BYTE_LEVEL.get_vocab_size() - 1)
high_bytes = st.sampled_from([BYTE_LEVEL.token_to_id(token) for token in "äåæçèéðñòóôõ¡¢£¤¥¬®¯°±" if len(token) == 1])
answers = st.one_of(
    st.lists(token_ids, max_size=80),
    st.lists(high_bytes, max_size=80),
    st.lists(st.just(END), max_size=80),
    st.text(max_size=60).map(lambda text: BYTE_LEVEL.encode(text).ids),
)


def detokenizer(stop: Sequence[str] = ()) -> Detokenizer:
    return Detokenizer(IncrementalDecoder(BYTE_LEVEL.decode), StopFinder(tuple(stop)))


def pieces(ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = detokenizer(stop)
    return [*(stream.add(token_id) for token_id in ids), stream.flush()]


def cut(text: str, stop: Sequence[str]) -> str:
    """What a client must see: feed single characters and stop at the first stop string that is complete."""
    for end in range(len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)]
    return text


@given(answers)
def test_the_pieces_of_any_token_sequence_are_its_whole_text(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == BYTE_LEVEL.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(text: str) -> None:
    got = pieces(BYTE_LEVEL.encode(text).ids)
    assert "".join(got) == text
    assert all("�" not in piece for piece in got) or "�" in text


def test_a_character_appears_with_its_last_byte_and_not_later() -> None:
    assert pieces(BYTE_LEVEL.encode("是.").ids) == ["", "", "是", ".", ""]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    assert pieces(BYTE_LEVEL.encode("a是").ids[:-1]) == ["a", "", "", "�"]


@given(answers)
def test_the_window_stays_short(ids: list[int]) -> None:
    stream = IncrementalDecoder(BYTE_LEVEL.decode)
    for token_id in ids * 4:
        stream.add(token_id)
        assert len(stream.ids) <= 2 * MAX_PENDING + 2


def test_a_token_keeps_the_space_that_it_has_within_a_text() -> None:
    """A SentencePiece vocabulary writes no space before the first word of what it decodes."""
    backend = tokenizers.Tokenizer(models.BPE({"▁a": 0, "▁b": 1}, []))
    backend.decoder = decoders.Metaspace()
    stream = IncrementalDecoder(backend.decode)
    assert [stream.add(0), stream.add(1), stream.add(1), stream.flush()] == ["a", " b", " b", ""]


@pytest.fixture(scope="module", params=STYLES)
def styled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer(folder, request.param)
    return load_tokenizer(folder)


@given(text=st.text(max_size=40) | st.text(" ab是🙂", max_size=40), num_silent=st.integers(0, 3))
def test_the_pieces_are_the_whole_text_in_every_style_of_tokenizer(
    styled: Tokenizer, text: str, num_silent: int
) -> None:
    ids = styled.encode(text) + list(styled.eos_token_ids[:1]) * num_silent + styled.encode(" and more")
    stream = IncrementalDecoder(styled.decode)
    assert "".join([*(stream.add(token_id) for token_id in ids), stream.flush()]) == styled.decode(ids)


stop_strings = st.lists(st.text("ab是", min_size=1, max_size=4), min_size=1, max_size=4)


@given(st.text("ab是", max_size=40), stop_strings)
def test_text_ends_before_the_first_complete_stop_string(text: str, stop: list[str]) -> None:
    assert "".join(pieces(BYTE_LEVEL.encode(text).ids, stop)) == cut(text, stop)


@given(st.lists(st.text("ab", max_size=5), max_size=10), stop_strings)
def test_where_the_text_is_split_changes_nothing(parts: list[str], stop: list[str]) -> None:
    finder = StopFinder(tuple(stop))
    got = [finder.add(part) for part in parts]
    assert "".join([*got, finder.flush()]) == cut("".join(parts), stop)


@given(st.text("ab是", max_size=40), stop_strings)
def test_no_more_is_held_back_than_a_stop_string_could_need(text: str, stop: list[str]) -> None:
    finder = StopFinder(tuple(stop))
    for end, character in enumerate(text, 1):
        finder.add(character)
        if finder.found:
            break
        candidates = [string[:size] for string in stop for size in range(len(string))]
        assert finder.held == max((head for head in candidates if text[:end].endswith(head)), key=len)


def test_the_stop_string_that_was_found_is_named() -> None:
    stream = detokenizer(["USER:", "\n\n"])
    text = "".join(stream.add(token_id) for token_id in BYTE_LEVEL.encode("hello\nUSER: more").ids)
    assert (text, stream.stopped_by, stream.flush()) == ("hello\n", "USER:", "")


def test_the_tail_of_an_almost_complete_stop_string_is_flushed() -> None:
    stream = detokenizer(["STOP"])
    assert "".join(stream.add(token_id) for token_id in BYTE_LEVEL.encode("say STO").ids) == "say "
    assert stream.flush() == "STO"
