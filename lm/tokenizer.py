"""Text to token ids and back, from the tokenizer file of a model folder. Torch-free.

Three kinds of file, told apart by their content: `tokenizer.json` (transformers' fast tokenizers), SentencePiece's
`tokenizer.model` and Llama 3's `tokenizer.model` in tiktoken's form. Ids are those of the library that each kind
belongs to; of a tokenizer.json those of transformers' `AutoTokenizer` on the same folder. Special tokens inside the
text are found with each kind, those that tokenizer_config.json and special_tokens_map.json name included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lm.config import CONFIG_FILE, read_hf_config
from lm.errors import NotFoundError, UserError
from lm.meta_params import PARAMS_FILE
from lm.sentencepiece_backend import load_sentencepiece, own_names
from lm.tiktoken_file import NAMED, is_tiktoken, load_tiktoken
from lm.tokenizer_settings import TokenSettings, read_json, read_settings
from lm.tokenizers_backend import Backend, load_tokenizer_json

FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
"""In a model folder, the preferred one first. Meta's own files stand in `original`."""
MAX_FILE_BYTES = 128 << 20  # the largest of known models, Gemma's tokenizer.json, has 33 MB
LLAMA3_ENDS = ("<|eot_id|>", "<|eom_id|>")
CHATML_ENDS = ("<|im_end|>",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizer:
    """A tokenizer with the special tokens of its model. Safe to use from several threads."""

    backend: Backend
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token`, `pad_token` ... -> the token's text; those the model lacks are absent."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer, the tokenizer's own first."""
    vocab_size: int
    """Number of tokens, added ones included. The model's embedding may have more rows."""
    origin: str
    """Which file it came from and of which kind that is, for people."""

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens.get("eos_token")

    def has(self, *tokens: str) -> bool:
        """Whether each of `tokens` is one token."""
        return all(self.backend.token_to_id(token) is not None for token in tokens)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens` adds what the model wants around raw text, such as a BOS.

        Special tokens that are spelled out in `text` become their ids. Raises UserError for text that is not
        Unicode (a lone surrogate).
        """
        _check_unicode(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """`encode` without added special tokens, and for each token the index in `text` behind its last character.

        Ends never fall; the byte tokens of one character all end behind it. Starts would be of no use here: some
        tokenizers leave the leading space out of them.
        """
        _check_unicode(text)
        ids, ends = self.backend.encode_with_ends(text)
        return ids, list(accumulate(ends, max))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids without a token are left out. Bytes that are not whole UTF-8 characters come out as
        U+FFFD.
        """
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def tokenizer_json(self) -> str | None:
        """The tokenizer as a tokenizer.json; None for SentencePiece, whose file is to be copied instead."""
        return self.backend.to_json()


def load_tokenizer(folder: Path, file: Path | None = None) -> Tokenizer:
    """Read the tokenizer of the model folder `folder`: the first of FILES that it has, or `file`, which may stand
    anywhere.

    Raises NotFoundError when the folder or `file` does not exist, UserError when a file is missing, damaged or too
    large, or when the tokenizer has more tokens than the model has embeddings.
    """
    path = _find_file(folder, file)
    data = _read_file(path)
    settings = read_settings(folder)
    backend, kind, own = _load_backend(path, data, settings)
    special_tokens = own | {name: token.content for name, token in settings.named.items()}
    config = model_config(folder)
    _check_embeddings(folder, backend, config)
    return Tokenizer(
        backend=backend,
        special_tokens=special_tokens,
        bos_token_id=next(iter(_token_ids(backend, special_tokens.get("bos_token"), config.get("bos_token_id"))), None),
        eos_token_ids=_eos_token_ids(backend, special_tokens.get("eos_token"), folder, config),
        vocab_size=backend.vocab_size,
        origin=f"{path.relative_to(folder) if path.is_relative_to(folder) else path} ({kind})",
    )


def model_config(folder: Path) -> dict[str, Any]:
    """The model's config as in config.json; empty where the folder has none."""
    known = (CONFIG_FILE, PARAMS_FILE, f"original/{PARAMS_FILE}")
    return read_hf_config(folder) if any((folder / name).is_file() for name in known) else {}


def _find_file(folder: Path, file: Path | None) -> Path:
    if not folder.is_dir():
        raise NotFoundError(f"there is no model folder {folder}", param="model")
    if file is not None:
        if not file.is_file():
            raise NotFoundError(f"there is no tokenizer file {file}", param="tokenizer_file")
        return file
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder} has no tokenizer: put one of {', '.join(FILES)} there", param="model")


def _read_file(path: Path) -> bytes:
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        reason = f"{size} bytes are over the limit of {MAX_FILE_BYTES} for a tokenizer"
        raise UserError(f"{path} is not a tokenizer file: {reason}", param="model")
    return path.read_bytes()


def _load_backend(path: Path, data: bytes, settings: TokenSettings) -> tuple[Backend, str, dict[str, str]]:
    """The tokenizer, its kind for people, and the special tokens by name that the file itself brings."""
    if path.suffix == ".json" or data.lstrip()[:1] == b"{":
        return load_tokenizer_json(path, data, settings), "tokenizers", {}
    if is_tiktoken(data):
        return load_tiktoken(path, data, settings), "tiktoken", dict(NAMED)
    pieces = load_sentencepiece(path, data, settings)
    return pieces, "SentencePiece", own_names(pieces)


def _eos_token_ids(backend: Backend, eos: str | None, folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The configured ones, and what ends a turn in every chat of the family, which base models do not configure."""
    configured = read_json(folder / "generation_config.json").get("eos_token_id")
    ids = _token_ids(backend, eos, configured, config.get("eos_token_id"))
    turns: tuple[str, ...] = LLAMA3_ENDS if backend.token_to_id("<|start_header_id|>") is not None else ()
    if str(config.get("model_type")).startswith("qwen"):
        turns = CHATML_ENDS
    return _token_ids(backend, None, [*ids, *map(backend.token_to_id, turns)])


def _token_ids(backend: Backend, text: str | None, *configured: Any) -> tuple[int, ...]:
    """Ids of a named token and of `..._token_id` entries (an integer, a list or null), each once."""
    ids = [] if text is None else [backend.token_to_id(text)]
    for entry in configured:
        ids += entry if isinstance(entry, list) else [entry]
    # configs carry ids that no vocabulary has, such as -1 for "none"
    return tuple(dict.fromkeys(i for i in ids if isinstance(i, int) and i >= 0 and backend.id_to_token(i) is not None))


def _check_embeddings(folder: Path, backend: Backend, config: dict[str, Any]) -> None:
    """An id without an embedding would be read past the end of the table by the first prompt that spells it."""
    rows = config.get("vocab_size")
    if isinstance(rows, int) and backend.last_id >= rows:
        token = backend.id_to_token(backend.last_id)
        raise UserError(
            f"the tokenizer in {folder} has token {backend.last_id} ({token!r}) but vocab_size in config.json is "
            f"{rows}: take the tokenizer that belongs to these weights",
            param="model",
        )


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode: character {error.start} is the lone surrogate "
            f"U+{ord(text[error.start]):04X}; send it as UTF-8 or as a \\u pair"
        ) from error
