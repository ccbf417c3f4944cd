"""The keys that clients must show, and the one that signs webhooks: how they are written, and a file of them. No message
shows one. Torch-free."""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Annotated

from pydantic import PlainValidator, SecretStr
from pydantic_core import PydanticCustomError

from lm.errors import UserError
from trainer.strict import SECRET

KEY = re.compile(r"[A-Za-z0-9._~+/=:@!#$%^&*|-]{1,512}")
ALLOWED = "a key has 1 to 512 letters, digits and signs among . _ ~ + / = : @ ! # $ % ^ & * | -"
MAX_KEYS = 1000
MIN_SECRET = 16
MAX_FILE_BYTES = 1 << 20


def parse_keys(value: object) -> tuple[SecretStr, ...]:
    """A list, or a text with commas between the keys."""
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
        value = [item.strip().strip("\"'") for item in value]
    if not isinstance(value, list | tuple):
        raise PydanticCustomError(SECRET, "must be a list of keys, or a text with commas between them")
    keys = [item.get_secret_value() if isinstance(item, SecretStr) else item for item in value]
    if len(keys) > MAX_KEYS:
        raise PydanticCustomError(SECRET, f"at most {MAX_KEYS} keys")
    for number, key in enumerate(keys, 1):
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise PydanticCustomError(SECRET, f"number {number} is no key: {ALLOWED}; quotes keep a number a text")
    return tuple(map(SecretStr, keys))


def parse_webhook_secret(value: object) -> SecretStr | None:
    if value is None or isinstance(value, SecretStr):
        return value
    if not isinstance(value, str) or len(value) < MIN_SECRET:
        raise PydanticCustomError(SECRET, f"a text of at least {MIN_SECRET} characters is expected")
    try:
        secret_bytes(value)
    except ValueError as error:
        raise PydanticCustomError(SECRET, f"{error}") from None
    return SecretStr(value)


def secret_bytes(secret: str) -> bytes:
    """The key of a webhook secret: what stands behind `whsec_` in base64, or the text itself. Raises ValueError."""
    if not secret.startswith("whsec_"):
        return secret.encode()
    try:
        return base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error:
        raise ValueError("what follows whsec_ must be base64") from None


ApiKeys = Annotated[tuple[SecretStr, ...], PlainValidator(parse_keys)]
WebhookSecret = Annotated[SecretStr | None, PlainValidator(parse_webhook_secret)]


def read_key_file(path: Path) -> tuple[SecretStr, ...]:
    """One key a line; empty lines, and those that begin with `#`, are left out. Raises UserError."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"api_key_file: {path} is larger than {MAX_FILE_BYTES} bytes", param="api_key_file")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"api_key_file: cannot read {path}: {error.strerror}", param="api_key_file") from error
    except UnicodeDecodeError:
        raise UserError(f"api_key_file: {path} is no text in UTF-8", param="api_key_file") from None
    keys = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
    for number, key in keys.items():
        if not KEY.fullmatch(key):
            raise UserError(f"api_key_file: line {number} of {path} is no key: {ALLOWED}", param="api_key_file")
    if not keys:
        raise UserError(f"api_key_file: {path} holds no key; write one a line", param="api_key_file")
    return tuple(map(SecretStr, keys.values()))
