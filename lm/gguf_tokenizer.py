"""The tokenizer in a GGUF file's metadata, rewritten as the files of a Hugging Face folder. Torch-free.

Byte-level BPE (`gpt2`) becomes a tokenizer.json; the name in `tokenizer.ggml.pre` says how llama.cpp cuts text into
words. SentencePiece (`llama`) becomes a tokenizer.model: that file is a small protobuf message, written here by hand.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lm.errors import UserError
from lm.tiktoken_file import WORDS as LLAMA3_WORDS

NORMAL_TOKEN, UNKNOWN_TOKEN, CONTROL_TOKEN, USER_DEFINED_TOKEN, UNUSED_TOKEN, BYTE_TOKEN = range(1, 7)
"""llama.cpp's token types, which are SentencePiece's."""
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DEFAULT_WORDS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", "[0-9][0-9][0-9]")
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_BPE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """How a kind of byte-level BPE treats text before it merges."""

    split: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    """A word that is a token stays whole, whatever the merges."""
    compose: bool = False
    """Unicode's composed form (NFC) first, as the original tokenizers do and llama.cpp does not."""
    add_bos: bool = False
    """Before raw text, where the file does not say."""


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit by itself, then GPT-2's words (llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM)."""
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _by(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    """Cut by each pattern in turn: what it finds and what lies between are parts."""

    def make() -> pre_tokenizers.PreTokenizer:
        cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


PRE_TOKENIZERS = {
    "smollm": Words(split=_smollm),
    "llama-bpe": Words(split=_by(LLAMA3_WORDS), ignore_merges=True, add_bos=True),
    "qwen2": Words(split=_by(QWEN2_WORDS), compose=True),
    "gpt-2": Words(split=_gpt2),
    "default": Words(split=_by(*DEFAULT_WORDS)),
}
SUPPORTED = (*(f"gpt2/{pre}" for pre in PRE_TOKENIZERS), "llama (SentencePiece)")


def write_tokenizer(target: Path, fields: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write the tokenizer, its tokenizer_config.json and the chat template, where there is one, into `target`.

    Raises UserError naming the tokenizer that is not supported, or what about it is damaged.
    """
    if fields.get("tokenizer.ggml.model") == "llama":
        (target / "tokenizer.model").write_bytes(sentencepiece_model(fields))
    else:
        build_tokenizer(fields).save(str(target / "tokenizer.json"))
    settings = json.dumps(_tokenizer_config(fields, config), ensure_ascii=False, indent=2)
    (target / "tokenizer_config.json").write_text(settings + "\n", encoding="utf-8")
    if template := fields.get("tokenizer.chat_template"):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file's metadata describe."""
    words = _words(fields)
    tokens = _used_tokens(fields)
    vocab = {token: index for index, (token, _) in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in fields["tokenizer.ggml.merges"])]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=words.ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the GGUF file's tokenizer is damaged: {error}") from error
    if words.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words.split()
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token, kind in tokens if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in tokens if kind == USER_DEFINED_TOKEN])
    _put_around(tokenizer, fields, words)
    return tokenizer


def sentencepiece_model(fields: Mapping[str, Any]) -> bytes:
    """SentencePiece's ModelProto. Field numbers are those of its sentencepiece_model.proto."""
    tokens, scores, kinds = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    pieces = zip(tokens, scores, kinds, strict=True)
    model = b"".join(
        _message(1, _text(1, token) + _float(2, score) + _integer(3, kind)) for token, score, kind in pieces
    )
    model += _message(2, _trainer_spec(fields, tokens, kinds))
    add_prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    squeeze = fields.get("tokenizer.ggml.remove_extra_whitespaces", False)
    model += _message(3, _text(1, "identity") + _integer(3, add_prefix) + _integer(4, squeeze) + _integer(5, 1))
    try:
        SentencePieceProcessor().load_from_serialized_proto(model)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the GGUF file's tokenizer is damaged: SentencePiece refuses it: {error}") from error
    return model


def _words(fields: Mapping[str, Any]) -> Words:
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(f"the GGUF file has the tokenizer {model}/{pre}; supported: {', '.join(SUPPORTED)}")
    return PRE_TOKENIZERS[pre]


def _used_tokens(fields: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Tokens with their types, by id. Those that only fill up the embedding (`[PAD151936]`) stand last and go."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    kinds: list[int] = fields.get("tokenizer.ggml.token_type", [NORMAL_TOKEN] * len(tokens))
    used = list(zip(tokens, kinds, strict=True))
    while used and used[-1][1] == UNUSED_TOKEN:
        used.pop()
    return used


def _put_around(tokenizer: Tokenizer, fields: Mapping[str, Any], words: Words) -> None:
    """Let raw text begin with a BOS and end with an EOS where the file, or the kind of tokenizer, says so."""
    names = _names(fields)
    bos = names.get("bos_token") if fields.get("tokenizer.ggml.add_bos_token", words.add_bos) else None
    eos = names.get("eos_token") if fields.get("tokenizer.ggml.add_eos_token", False) else None
    before, after = [[token] if token is not None else [] for token in (bos, eos)]
    if around := list(dict.fromkeys(before + after)):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
        )


def _names(fields: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` ... -> the token's text."""
    tokens = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in NAMED.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None}


def _tokenizer_config(fields: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    # The generic class takes tokenizer.json as it stands; GPT2Tokenizer would drop the splitting of digits.
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if fields["tokenizer.ggml.model"] == "llama":
        kind = {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": bool(fields.get("tokenizer.ggml.add_bos_token", True)),
            "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
            "legacy": True,  # llama.cpp puts the prefix space behind special tokens, too
        }
    return {
        **kind,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        **_names(fields),
    }


def _trainer_spec(fields: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> bytes:
    """SentencePiece finds the special pieces by their texts, and takes its own names where none is given."""
    spec = _integer(3, SENTENCEPIECE_BPE) + _integer(4, len(tokens)) + _integer(35, BYTE_TOKEN in kinds)
    names = _names(fields)
    for name, number in (("unk_token", 45), ("bos_token", 46), ("eos_token", 47), ("pad_token", 48)):
        if name in names:
            spec += _text(number, names[name])
    return spec


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _text(number: int, value: str) -> bytes:
    return _message(number, value.encode())


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", float(value))
