"""Tokenizers in exported GGUF files against the ones they were written from, read back by our own import."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lm.errors import UserError
from lm.gguf import convert_gguf
from lm.gguf_export import export_gguf
from lm.gguf_tokenizer_export import tokenizer_metadata
from lm.tokenizer import load_tokenizer
from tests.support.tiny import make_tiny_model
from tests.support.tiny_tokenizers import (
    CORPUS,
    STYLES,
    make_sentencepiece,
    make_tiktoken_file,
    write_json,
    write_tokenizer,
)

ROWS = 1024
TEXTS = (*CORPUS, " ", "I'll say: DON'T!!  12345 ½ Ⅻ +-=<>^~|$ “quoted” e\u0301tude\r\n\r\n  x \t\n", "💡🧪 new")


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = "ab '’sdtTLl.,!?<>|$+-_\n\r\t  0123456789é你好½Ⅻ😀"
    return ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(count)]


def make_folder(folder: Path, style: str, **config: Any) -> Path:
    """A model with a larger embedding than its tokenizer needs, as many have."""
    make_tiny_model(folder, "llama", **({"vocab_size": ROWS} | config))
    (folder / "generation_config.json").unlink()
    if style in STYLES:
        write_tokenizer(folder, style)
        return folder
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    if style == "tiktoken":
        make_tiktoken_file(folder / "tokenizer.model")
    else:
        make_sentencepiece(folder / "tokenizer.model")
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **settings})
    return folder


def round_trip(folder: Path) -> Path:
    export_gguf(folder, folder.with_suffix(".gguf"))
    back = folder.with_name(folder.name + "-back")
    back.mkdir()
    convert_gguf(folder.with_suffix(".gguf"), back)
    return back


@pytest.mark.parametrize("style", [*STYLES, "tiktoken", "sentencepiece"])
def test_an_imported_tokenizer_is_the_exported_one(tmp_path: Path, style: str) -> None:
    source = make_folder(tmp_path / style, style)
    original, imported = load_tokenizer(source), load_tokenizer(round_trip(source))
    for text in (*TEXTS, *random_texts(200)):
        ids = original.encode(text)
        assert imported.encode(text) == ids, text
        assert imported.decode(ids) == original.decode(ids)
    assert imported.bos_token_id == original.bos_token_id
    assert imported.eos_token_ids[: len(original.eos_token_ids)] == original.eos_token_ids
    for name in ("bos_token", "eos_token", "unk_token"):
        assert imported.special_tokens.get(name) == original.special_tokens.get(name)


@pytest.mark.parametrize(("style", "name"), [("smollm2", "smollm"), ("llama3", "llama-bpe"), ("tiktoken", "llama-bpe")])
def test_the_way_of_cutting_words_has_llama_cpps_name(tmp_path: Path, style: str, name: str) -> None:
    metadata = tokenizer_metadata(load_tokenizer(make_folder(tmp_path / style, style)), ROWS)
    assert metadata["tokenizer.ggml.pre"] == name
    assert metadata["tokenizer.ggml.add_bos_token"] == (name == "llama-bpe")
    assert len(metadata["tokenizer.ggml.tokens"]) == ROWS
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{ROWS - 1}]"
    assert metadata["tokenizer.ggml.token_type"][-1] == int(gguf.TokenType.UNUSED)


def test_special_tokens_are_control_and_other_added_ones_user_defined(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "smollm2", "smollm2")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(source / "tokenizer.json"))
    metadata = tokenizer_metadata(load_tokenizer(source), ROWS)
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<|im_end|>"] == int(gguf.TokenType.CONTROL)
    assert kinds["<think>"] == int(gguf.TokenType.USER_DEFINED)
    text = "<|im_start|>a<think>b</think><|im_end|>"
    assert load_tokenizer(round_trip(source)).encode(text) == load_tokenizer(source).encode(text)


def test_bytes_of_a_sentencepiece_model_are_marked(tmp_path: Path) -> None:
    for style in ("zephyr", "sentencepiece"):
        metadata = tokenizer_metadata(load_tokenizer(make_folder(tmp_path / style, style)), ROWS)
        assert metadata["tokenizer.ggml.token_type"].count(int(gguf.TokenType.BYTE)) == 256
        assert metadata["tokenizer.ggml.add_space_prefix"] is True
        assert metadata["tokenizer.ggml.unknown_token_id"] == 0


def refused(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        tokenizer_metadata(load_tokenizer(folder), ROWS)


def test_tokenizers_that_no_file_can_describe_are_refused(tmp_path: Path) -> None:
    unigram = make_folder(tmp_path / "unigram", "sentencepiece")
    make_sentencepiece(unigram / "tokenizer.model", "unigram")
    refused(unigram, "a SentencePiece tokenizer that is no BPE")
    normalized = make_folder(tmp_path / "normalized", "sentencepiece")
    make_sentencepiece(normalized / "tokenizer.model", normalization_rule_name="nmt_nfkc")
    refused(normalized, "that changes text before it cuts it")
    words = make_folder(tmp_path / "words", "smollm2")
    tokenizer = Tokenizer.from_file(str(words / "tokenizer.json"))
    cut = pre_tokenizers.Split(Regex("[aeiou]"), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
    tokenizer.save(str(words / "tokenizer.json"))
    refused(words, "cuts text into words unlike smollm, llama-bpe, qwen2, gpt-2, default")
    lower = make_folder(tmp_path / "lower", "smollm2")
    tokenizer = Tokenizer.from_file(str(lower / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(lower / "tokenizer.json"))
    refused(lower, "cuts text into words unlike")
    piece = make_folder(tmp_path / "piece", "smollm2")
    vocab = json.loads((piece / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    Tokenizer(models.WordPiece(vocab=vocab | {"[UNK]": len(vocab)})).save(str(piece / "tokenizer.json"))
    refused(piece, "a WordPiece tokenizer")
