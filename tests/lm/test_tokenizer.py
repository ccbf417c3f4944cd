"""Tokenizers beside transformers' AutoTokenizer, and what happens when a folder is not as it should be."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from lm.errors import NotFoundError, UserError
from lm.tokenizer import MAX_FILE_BYTES, load_tokenizer
from service.detokenizer import IncrementalDecoder
from tests.support.texts import random_texts
from tests.support.tiny_tokenizers import STYLES, make_sentencepiece, make_tiktoken_file, write_json, write_tokenizer


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_ids_and_decoded_text_equal_those_of_transformers(tmp_path: Path, style: str, add_special_tokens: bool) -> None:
    write_tokenizer(tmp_path, style)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in random_texts(300):
        ids = ours.encode(text, add_special_tokens=add_special_tokens)
        assert ids == theirs(text, add_special_tokens=add_special_tokens)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), text


@pytest.mark.parametrize("style", STYLES)
def test_tokenizer_json_ids_and_text_equal_those_of_transformers(
    tmp_path: Path, style: str, figure: Callable[[str, object], None]
) -> None:
    write_tokenizer(tmp_path, style)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = random_texts(10_000)
    ids = theirs(texts)["input_ids"]
    shown = theirs.batch_decode(ids)
    different = sum(
        ours.encode(text) != expected or ours.decode(expected, skip_special_tokens=False) != written
        for text, expected, written in zip(texts, ids, shown, strict=True)
    )
    figure(f"tokenizer.json ({style}): strings that differ from transformers", f"{different} of 10000")
    assert different == 0


@pytest.mark.parametrize("style", STYLES)
def test_ends_cut_the_text_into_its_tokens(tmp_path: Path, style: str) -> None:
    write_tokenizer(tmp_path, style)
    tokenizer = load_tokenizer(tmp_path)
    for text in random_texts(100):
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert ends == sorted(ends)
        assert not ends or ends[-1] == len(text)


def test_the_bytes_of_one_character_all_end_behind_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    ids, ends = load_tokenizer(tmp_path).encode_with_ends("a鑫b")
    assert len(ids) == 5
    assert ends == [1, 2, 2, 2, 3]


def test_truncation_and_padding_stored_in_the_file_are_switched_off(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    path = str(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    text = "Hello world " * 8
    expected = backend.encode(text).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(path)
    assert load_tokenizer(tmp_path).encode(text) == expected


def test_every_eos_id_is_found_wherever_it_is_configured(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama3")
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 4]})
    write_json(tmp_path / "config.json", {"eos_token_id": 2, "bos_token_id": 3, "vocab_size": 1000})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_token_ids == (4, 1, 2)
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.bos_token_id == 0


def test_ids_that_no_vocabulary_has_do_not_become_eos_ids(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    write_json(tmp_path / "tokenizer_config.json", {})
    write_json(tmp_path / "config.json", {"eos_token_id": [-1, None, 99_999], "bos_token_id": 1})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token_ids, tokenizer.eos_token, tokenizer.bos_token_id) == ((), None, 1)


NEW = {"content": "<|new|>", "lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
NEWER = {"content": "<|newer|>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"additional_special_tokens": ["<|new|>", {"__type": "AddedToken", **NEWER}]}},
        {"tokenizer_config.json": {"extra_special_tokens": ["<|new|>"], "pad_token": "<|pad|>"}},
        {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<|new|>"}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"10000": {**NEW, "special": True}}}},
        {
            "tokenizer_config.json": {"eos_token": "<|endoftext|>"},
            "special_tokens_map.json": {"eos_token": NEW, "pad_token": "<|pad|>"},
        },
    ],
)
def test_tokens_named_beside_tokenizer_json_are_added_as_transformers_adds_them(
    tmp_path: Path, files: dict[str, dict[str, Any]]
) -> None:
    write_tokenizer(tmp_path, "smollm2")
    for name, content in files.items():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config.json" else {}
        write_json(tmp_path / name, settings | content)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "a <|new|>  b<|newer|> <|pad|><|endoftext|> c"
    assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.vocab_size == len(theirs)
    assert ours.eos_token == theirs.eos_token
    assert ours.special_tokens.get("pad_token") == theirs.pad_token


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no model folder .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no tokenizer: put one of tokenizer\.json, tokenizer\.model, ") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.param == "model"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json is not a tokenizer file"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json must hold a JSON object, not list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', r"special tokens in .* are malformed"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"1": {"content": 3}}}',
            r"special tokens in .* are malformed",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}', r"special tokens in .* are malformed"),
        (
            "tokenizer_config.json",
            '{"eos_token": {"content": "x", "lstrip": 1}}',
            r"special tokens in .* are malformed",
        ),
        ("config.json", '{"vocab_size": 100}', r"vocab_size in config\.json is 100"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_file_and_the_reason(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    write_tokenizer(tmp_path, "smollm2")
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        load_tokenizer(tmp_path)


def test_a_lone_surrogate_is_refused_with_its_place(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    with pytest.raises(UserError, match=r"character 2 is the lone surrogate U\+D800"):
        load_tokenizer(tmp_path).encode(json.loads(r'"ab\ud800"'))


def test_tokenizer_and_template_load_neither_torch_nor_transformers() -> None:
    code = "import sys, lm.template, lm.tokenizer; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "set()\n"


KINDS: dict[str, Callable[[Path], object]] = {
    "BPE": make_sentencepiece,
    "unigram": lambda path: make_sentencepiece(path, "unigram"),
    "NFKC": lambda path: make_sentencepiece(path, "unigram", byte_fallback=False, normalization_rule_name="nmt_nfkc"),
    "tiktoken": make_tiktoken_file,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_an_answer_put_together_are_the_whole(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>"]})
    tokenizer = load_tokenizer(tmp_path)
    rng = random.Random(1)
    answers = [tokenizer.encode(text) for text in random_texts(500)]
    answers += [[rng.randrange(tokenizer.backend.last_id + 3) for _ in range(rng.randrange(40))] for _ in range(500)]
    for ids in answers:
        decoder = IncrementalDecoder(tokenizer.decode)
        pieces = [decoder.add(token_id) for token_id in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["BPE", "unigram", "tiktoken"])
def test_ends_of_the_tokens_of_a_tokenizer_model_reach_the_end_of_the_text(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    for text in random_texts(1000):
        ids, ends = tokenizer.encode_with_ends(text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(ends)
        assert ends == sorted(ends)
        assert ends[-1:] == [len(text)][: len(ends)]
        for end in set(ends):
            shown = tokenizer.decode(ids[: bisect_right(ends, end)], skip_special_tokens=False)
            assert shown.endswith((text[end - 1], text[end - 1].replace("▁", " "), "\ufffd"))


def test_a_named_file_is_used_instead_of_the_folders_own(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama3")
    (tmp_path / "other").mkdir()
    num_ranks = make_tiktoken_file(tmp_path / "other" / "tokenizer.model")
    make_sentencepiece(tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path).origin == "tokenizer.json (tokenizers)"
    assert load_tokenizer(tmp_path, tmp_path / "tokenizer.model").origin == "tokenizer.model (SentencePiece)"
    tokenizer = load_tokenizer(tmp_path, tmp_path / "other" / "tokenizer.model")
    assert tokenizer.origin == "other/tokenizer.model (tiktoken)"
    assert tokenizer.encode("Hi")[0] == num_ranks
    with pytest.raises(NotFoundError, match=r"no tokenizer file .*nowhere") as caught:
        load_tokenizer(tmp_path, tmp_path / "nowhere")
    assert caught.value.param == "tokenizer_file"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match="134217729 bytes are over the limit of 134217728"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [make_sentencepiece, make_tiktoken_file])
def test_more_tokens_than_embeddings_are_refused_for_every_kind(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "tokenizer.model")
    write_json(tmp_path / "config.json", {"vocab_size": 480})
    with pytest.raises(UserError, match=r"but vocab_size in config\.json is 480"):
        load_tokenizer(tmp_path)


def test_qwens_turn_end_is_an_end_whatever_the_base_model_configures(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    assert load_tokenizer(tmp_path).eos_token_ids == (0, 2)


@pytest.mark.parametrize("work", ["encode", "encode_with_ends", "decode"])
def test_other_threads_run_while_a_long_text_is_worked_on(tmp_path: Path, work: str) -> None:
    write_tokenizer(tmp_path, "smollm2")
    tokenizer = load_tokenizer(tmp_path)
    text = "a b c d " * (200_000 if work == "decode" else 60_000)
    argument = tokenizer.encode(text) if work == "decode" else text
    thread = threading.Thread(target=getattr(tokenizer, work), args=(argument,))
    thread.start()
    start = last = time.monotonic()
    stalls = []
    while thread.is_alive():
        time.sleep(0.001)
        stalls.append(time.monotonic() - last)
        last += stalls[-1]
    assert max(stalls) < (last - start) / 2
