"""Llama 3's `tokenizer.model`: tiktoken's lines of a base64 token and its rank. Torch-free.

The file is converted into a byte-level BPE of the `tokenizers` library (docs/decisions/004). It holds neither the
regex that cuts text into words nor the special tokens: both are Llama 3's, as Meta's llama-models and torchtune have
them. tiktoken merges any two neighbours whose bytes together are a token, lowest rank first, so each way to cut a
token into two tokens becomes a merge.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from lm.errors import UserError
from lm.tokenizer_settings import TokenSettings
from lm.tokenizers_backend import TokenizersBackend

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")
MAX_TOKEN_BYTES = 1024
NUM_SPECIAL_TOKENS = 256
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
NAMED = {"bos_token": BEGIN, "eos_token": END, "pad_token": PAD}
"""Where tokenizer_config.json names none."""
FIRST_SPECIAL_TOKENS = (
    *(BEGIN, END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", PAD, "<|step_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
"""Llama 3.1's. Llama 3 has those of them that its chats use at the same ids."""
PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}


def is_tiktoken(data: bytes) -> bool:
    return FIRST_LINE.match(data[: 2 * MAX_TOKEN_BYTES]) is not None


def load_tiktoken(path: Path, data: bytes, settings: TokenSettings) -> TokenizersBackend:
    """The tokenizer in `data`, the content of `path`; raw text gets a BOS unless the settings say otherwise.

    The 256 special tokens follow the ranks. Names that the settings declare for their ids win over Llama 3.1's.
    Raises UserError naming the line at fault.
    """
    ranks = _read_ranks(path, data)
    vocab = {_as_characters(token): rank for token, rank in ranks.items()}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=_merges(ranks), ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, level])
    inner.decoder = decoders.ByteLevel()
    special = _special_tokens(len(ranks), settings.declared)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.add_special_tokens([token for token in settings.special if token.content not in special])
    bos = settings.named["bos_token"].content if "bos_token" in settings.named else special[0]
    if settings.add_bos is not False:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    return TokenizersBackend(inner)


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Token -> rank in the order of the ranks, which are 0..n-1. Every byte is a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip():
            token, rank = _read_line(path, number, line)
            if token in ranks:
                raise _damaged(path, f"line {number}: the token {token!r:.80} stands there twice")
            ranks[token] = rank
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))):
        raise _damaged(path, f"its {len(ranks)} ranks must be 0 to {len(ranks) - 1}, each once: lines are missing")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise _damaged(path, f"{len(missing)} of the 256 bytes have no token, the first is 0x{missing[0]:02X}")
    return ranks


def _read_line(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    try:
        encoded, rank = line.split()
        token = b64decode(encoded, validate=True)
        if not 0 < len(token) <= MAX_TOKEN_BYTES or not rank.isdigit():
            raise ValueError
        return token, int(rank)
    except (binascii.Error, ValueError) as error:
        wanted = f"a base64 token of at most {MAX_TOKEN_BYTES} bytes and its rank"
        raise _damaged(path, f"line {number} must be {wanted} (got {line!r:.80})") from error


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a complete tiktoken file: {reason}. Download it again", param="model")


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    merges: list[tuple[str, str]] = []
    for token in ranks:
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [(_as_characters(left), _as_characters(right)) for _, _, left, right in sorted(pairs)]
    return merges


def _special_tokens(first_id: int, declared: Mapping[int, AddedToken]) -> list[str]:
    """The names of ids `first_id`.. in order, each once."""
    num_reserved = NUM_SPECIAL_TOKENS - len(FIRST_SPECIAL_TOKENS)
    known = [*FIRST_SPECIAL_TOKENS, *(f"<|reserved_special_token_{2 + index}|>" for index in range(num_reserved))]
    ours = {index: token.content for index, token in declared.items() if first_id <= index < first_id + len(known)}
    taken = set(ours.values())
    free = (f"<|unnamed_{index}|>" if name in taken else name for index, name in enumerate(known, start=first_id))
    return [ours.get(index, name) for index, name in enumerate(free, start=first_id)]


def _byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte (GPT-2): printable ones as they are, others from U+0100."""
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in PRINTABLE else next(others)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


def _as_characters(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)
