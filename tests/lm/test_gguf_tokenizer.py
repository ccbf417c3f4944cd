"""Tokenizers read out of GGUF metadata against those whose data were put there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer, Qwen2Tokenizer

from lm.errors import UserError
from lm.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer, sentencepiece_model, write_tokenizer
from lm.tokenizer import load_tokenizer
from tests.support.gguf_file import Metadata, bpe_metadata, sentencepiece_metadata, tiny_tokenizer
from tests.support.tiny_tokenizers import CORPUS, make_sentencepiece, write_json
from tests.support.tiny_tokenizers import write_tokenizer as write_original

TEXTS = (
    *CORPUS,
    "",
    " ",
    "I'll say: DON'T!!  12345 ½ Ⅻ  +-=<>^~|$ “quoted” a\u0301 e\u0301tude\r\n\r\n  x \t\n",
    "<|im_start|>user\n<think>the</think><|im_end|><|endoftext|>",
)
CONFIG = {"max_position_embeddings": 256}


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = "ab '’sdtTLl.,!?<>|$+-_\n\r\t  0123456789é\u0301你好½Ⅻ😀"
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count)]


def model_of(tokenizer: Tokenizer) -> dict[str, Any]:
    data = json.loads(tokenizer.to_str())["model"]
    return {"vocab": data["vocab"], "merges": [(left, right) for left, right in data["merges"]]}


ORIGINALS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: GPT2Tokenizer(**model_of(tiny_tokenizer())).backend_tokenizer,
    "qwen2": lambda: Qwen2Tokenizer(**model_of(tiny_tokenizer())).backend_tokenizer,
    "smollm": tiny_tokenizer,
}


def with_tokens(tokenizer: Tokenizer) -> Tokenizer:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    return tokenizer


def llama3(folder: Path) -> Tokenizer:
    write_original(folder, "llama3")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def compare(ours: Tokenizer, theirs: Tokenizer, **options: Any) -> int:
    texts = [*TEXTS, *random_texts(300)]
    for text in texts:
        expected = theirs.encode(text, **options)
        assert ours.encode(text, **options).ids == expected.ids, text
        for skip in (True, False):
            assert ours.decode(expected.ids, skip_special_tokens=skip) == theirs.decode(
                expected.ids, skip_special_tokens=skip
            )
    return len(texts)


@pytest.mark.parametrize("pre", ORIGINALS)
def test_byte_level_bpe_gives_the_ids_of_transformers(pre: str, figure: Callable[[str, object], None]) -> None:
    theirs = with_tokens(ORIGINALS[pre]())
    count = compare(build_tokenizer(bpe_metadata(theirs, pre)), theirs)
    figure(f"GGUF tokenizer {pre}", f"{count} texts with the ids of the original")


def test_llama_3s_tokenizer_begins_with_a_bos_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    theirs = llama3(tmp_path)
    metadata = bpe_metadata(theirs, "llama-bpe") | {"tokenizer.ggml.bos_token_id": 0}
    compare(build_tokenizer(metadata), theirs)
    assert theirs.encode("a").ids[0] == 0
    without = build_tokenizer(metadata | {"tokenizer.ggml.add_bos_token": False})
    compare(without, theirs, add_special_tokens=False)
    assert without.encode("a").ids == theirs.encode("a").ids[1:]


def test_a_bos_and_an_eos_are_put_around_where_the_file_says_so() -> None:
    original = with_tokens(tiny_tokenizer())
    around = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ours = build_tokenizer(bpe_metadata(original, "smollm") | around)
    assert ours.encode("the cat").ids == [1, *original.encode("the cat").ids, 2]
    assert ours.encode("the", "cat").ids == [1, *original.encode("the").ids, 2, 1, *original.encode("cat").ids, 2]


def test_where_a_file_names_no_pre_tokenizer_words_are_cut_in_four_steps() -> None:
    """llama.cpp's own default; the same with another library for regular expressions."""
    steps = (
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        r"[0-9][0-9][0-9]",
    )
    cutter = PRE_TOKENIZERS["default"].split()
    for text in [*TEXTS, *random_texts(300)]:
        words = [text] if text else []
        for step in steps:
            words = [part for word in words for part in regex.split(f"({step})", word) if part]
        found = [text[start:end] for _, (start, end) in cutter.pre_tokenize_str(text)]
        assert found == words
    metadata = bpe_metadata(tiny_tokenizer(), "default")
    named = build_tokenizer(metadata).to_str()
    del metadata["tokenizer.ggml.pre"]
    assert build_tokenizer(metadata).to_str() == named


def test_tokens_that_only_fill_up_the_embedding_are_left_out() -> None:
    metadata = bpe_metadata(with_tokens(tiny_tokenizer()), "qwen2")
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["[PAD1]", "[PAD2]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.token_to_id("[PAD1]") is None


@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<think>", "你"]}, {"add_dummy_prefix": False}])
def test_sentencepiece_gives_the_ids_of_the_original_file(
    tmp_path: Path, options: dict[str, Any], figure: Callable[[str, object], None]
) -> None:
    make_sentencepiece(tmp_path / "original.model", **options)
    metadata = sentencepiece_metadata(tmp_path / "original.model")
    metadata |= {"tokenizer.ggml.add_space_prefix": options.get("add_dummy_prefix", True)}
    kinds = metadata["tokenizer.ggml.token_type"]
    for symbol in options.get("user_defined_symbols", ()):
        kinds[metadata["tokenizer.ggml.tokens"].index(symbol)] = 4
    theirs, ours = SentencePieceProcessor(), SentencePieceProcessor()
    theirs.load(str(tmp_path / "original.model"))
    ours.load_from_serialized_proto(sentencepiece_model(metadata))
    texts = [*TEXTS, *random_texts(300), *(f"   {text}  " for text in TEXTS)]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_id(), ours.eos_id(), ours.unk_id(), ours.pad_id()) == (1, 2, 0, -1)
    figure(f"GGUF tokenizer llama {options}", f"{len(texts)} texts with the ids of the original")


def test_a_sentencepiece_folder_tokenizes_as_one_with_the_original_file(tmp_path: Path) -> None:
    for name in ("original", "converted", "bare"):
        (tmp_path / name).mkdir()
    make_sentencepiece(tmp_path / "original/tokenizer.model")
    write_json(tmp_path / "original/tokenizer_config.json", {"legacy": True})
    metadata = sentencepiece_metadata(tmp_path / "original/tokenizer.model")
    write_tokenizer(tmp_path / "converted", metadata | {"tokenizer.chat_template": "{{ x }}"}, CONFIG)
    write_tokenizer(tmp_path / "bare", metadata | {"tokenizer.ggml.add_bos_token": False}, CONFIG)
    theirs, ours, bare = (load_tokenizer(tmp_path / name) for name in ("original", "converted", "bare"))
    for text in [*TEXTS, "<s>[INST] the </s>the", *random_texts(100)]:
        assert ours.encode(text) == theirs.encode(text) == [1, *bare.encode(text)]
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
    assert (ours.bos_token, ours.eos_token, ours.eos_token_ids) == ("<s>", "</s>", (2,))
    assert (tmp_path / "converted/chat_template.jinja").read_text() == "{{ x }}"
    assert not (tmp_path / "bare/chat_template.jinja").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "converted")
    for text in ("the quick brown fox", "Hello, world! 12345", "你好 🙂"):
        assert loaded(text)["input_ids"] == ours.encode(text)


def kinds_of(metadata: Metadata) -> list[int]:
    return list(metadata["tokenizer.ggml.token_type"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: {"tokenizer.ggml.tokens": ["", *data["tokenizer.ggml.tokens"][1:]]},
        lambda data: {"tokenizer.ggml.tokens": ["<s>", *data["tokenizer.ggml.tokens"][1:]]},
        lambda data: {"tokenizer.ggml.token_type": [*kinds_of(data)[:-1], 6]},
    ],
    ids=["empty", "twice", "no byte"],
)
def test_a_damaged_sentencepiece_vocabulary_is_refused(tmp_path: Path, damage: Callable[[Metadata], Metadata]) -> None:
    make_sentencepiece(tmp_path / "original.model")
    metadata = sentencepiece_metadata(tmp_path / "original.model")
    with pytest.raises(UserError, match="tokenizer is damaged: SentencePiece refuses it"):
        sentencepiece_model(metadata | damage(metadata))


def test_merges_of_tokens_that_do_not_exist_are_refused() -> None:
    metadata = bpe_metadata(tiny_tokenizer(), "smollm") | {"tokenizer.ggml.merges": ["the xyz"]}
    with pytest.raises(UserError, match="tokenizer is damaged"):
        build_tokenizer(metadata)


@pytest.mark.parametrize(("model", "pre"), [("gpt2", "tekken"), ("bert", "default"), (None, None)])
def test_another_tokenizer_is_refused_by_name(model: str | None, pre: str | None) -> None:
    metadata = bpe_metadata(tiny_tokenizer(), "smollm") | {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}
    with pytest.raises(UserError, match=f"tokenizer {model}/{pre}; supported: gpt2/smollm, .*, llama .SentencePiece"):
        build_tokenizer(metadata)
