"""The settings of the service: defaults, then a YAML file, then TUNESERVE_* variables, then key=value. Torch-free."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field

from lm.errors import UserError
from lm.folder import user_path
from lm.layout import is_model_folder
from service.api_keys import ApiKeys, WebhookSecret, read_key_file
from service.database import registered_folder
from trainer.strict import ConfigLoader, Strict, parse_options, read_config

PREFIX = "TUNESERVE_"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
SECRETS = ("api_keys", "webhook_secret")
"""Settings whose text is taken as it stands, so that no mistake in reading it is shown."""
DEVICE = r"^(auto|cpu|(cuda|npu)(:\d+)?)$"


def parse_size(value: object) -> object:
    """`"2GiB"` -> 2147483648. Anything but a string is left to the type's own validation."""
    if not isinstance(value, str):
        return value
    match = SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("write a number of bytes, or one with a unit such as 512MiB or 2GB")
    number, unit = match.groups(default="")
    return int(float(number) * {**UNITS, **BINARY_UNITS}[unit.lower()])


Size = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


class Settings(Strict):
    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches the default; 0.0.0.0 opens the service to the network."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0 takes a free one; the line printed when ready names it."""
    home: Annotated[Path, Field(strict=False)] = Path("~/.tuneserve")
    """Models, data sets, runs and uploads."""
    state_dir: Annotated[Path | None, Field(strict=False)] = None
    """Where the database lives; must be a local disk. Default: `state` in home."""
    api_keys: ApiKeys = ()
    """With keys, every request but for health, readiness, metrics, version and docs must show one. Better than on the command
    line, which others on the machine can read, they stand in TUNESERVE_API_KEYS, with commas between them, or in `api_key_file`."""
    api_key_file: Annotated[Path | None, Field(strict=False)] = None
    """A file with further keys, one a line."""
    model: str = "smollm2-135m-instruct"
    """The base model that is served and fine-tuned: a name in `models` of home or one registered with POST /models, or the path of a
    Hugging Face folder."""
    served_model_aliases: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Further names for the served model, for clients whose model name is fixed."""
    allow_unknown_model: bool = False
    """Answer any `model` from the served one, instead of 404."""
    organization: Annotated[str, Field(pattern=r"^[a-z0-9-]{1,32}$")] = "tuneserve"
    """The third part of the ids of fine-tuned models, `ft:<base>:<organization>:<suffix>:<id>`."""

    device: Annotated[str, Field(pattern=DEVICE)] = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:N`, `npu`, `npu:N`."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the served weights. `auto` is what the device is fast at."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of the engine. Default: all cores."""
    max_model_len: Annotated[int, Field(ge=8, le=1_048_576)] | None = None
    """Longest prompt plus answer, in tokens. Default: the model's own limit."""
    max_num_seqs: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests that decode in one batch; more wait."""
    max_queued_requests: Annotated[int, Field(ge=0, le=100_000)] = 256
    """Requests that may wait; more get 429."""
    max_num_batched_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = 256
    """Tokens that one step of the engine computes: one for each answer under way, the rest for prompts. A smaller number
    makes answers flow more evenly while long prompts are read, a larger one reads them faster."""
    kv_cache_memory: Size | None = None
    """Memory of the key/value cache, in bytes or as 2GiB. Default: the engine chooses from what is free."""
    max_loaded_models: Annotated[int, Field(ge=1, le=64)] = 2
    """Sets of weights in memory at once: the served one, and others loaded when a request names them."""
    swap: Literal["auto", "overlap", "drain"] = "auto"
    """How new weights replace old ones: side by side where memory holds both, or after the running requests."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds the sampling of requests that name no seed."""

    max_body_size: Size = 16 << 20
    """Largest JSON body; a larger one gets 413."""
    max_upload_size: Size = 512 << 20
    """Largest uploaded file."""
    max_job_restarts: Annotated[int, Field(ge=0, le=100)] = 3
    """How often a job goes on by itself after its trainer died while the service was away. Stops and pauses do not count."""
    dry_run_seconds: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """How long a dry run of POST /finetune may take; what it has found out by then is answered."""
    cancel_grace_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long a trainer may take to end by itself, after a cancel or a stop of the service, before it is killed."""
    engine_silence_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = 300.0
    """An engine that says nothing for so long while requests run hangs: it is killed, at the latest after twice that time,
    and started again. null lets it hang."""
    webhook_secret: WebhookSecret = None
    """What signs the webhooks of jobs (Standard Webhooks, HMAC-SHA256): `whsec_` and base64, or any text of 16 characters or
    more. Best in TUNESERVE_WEBHOOK_SECRET. Without it no job can have a webhook."""
    webhook_allow_private: bool = False
    """Let webhooks go to addresses of private networks and of this machine, too."""
    drain_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """How long running requests may go on after the service was asked to stop, and before the engine sleeps."""
    serving_while_training: Literal["auto", "share", "sleep"] = "auto"
    """What becomes of serving while a job trains on its device. `share`: both run, each within its share of the memory;
    on a CPU the trainer lets others go first and takes fewer threads. `sleep`: the engine ends its requests, stops and frees
    the device, and comes back when the job is over. `auto`: `share` where both fit, which on a CPU they do, else `sleep`."""
    training_memory_share: Annotated[float, Field(ge=0.05, le=0.95)] = 0.5
    """With `share`: how much of the device's memory a trainer may take; the engine has the rest. Not on a CPU."""
    training_num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a trainer while the engine computes on the same CPU. Default: three quarters of the cores."""
    sleep_wait_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long a request waits for an engine that sleeps, before it is told to try again later (503)."""

    @property
    def models_dir(self) -> Path:
        return self.home / "models"

    @property
    def data_dir(self) -> Path:
        """The only folder from which HTTP may name files to train on."""
        return self.home / "data"

    @property
    def runs_dir(self) -> Path:
        return self.home / "runs"

    @property
    def files_dir(self) -> Path:
        return self.home / "files"

    @property
    def database(self) -> Path:
        return (self.state_dir or self.home / "state") / "tuneserve.db"

    @property
    def model_dir(self) -> Path:
        """The folder of the base model. Links stay: its name is what the model is called. Raises UserError."""
        for folder in (*self._registered, self.models_dir / self.model, user_path(self.model)):
            if is_model_folder(folder):
                return Path(os.path.abspath(folder))
        known = sorted(path.name for path in self.models_dir.glob("*") if is_model_folder(path))
        have = f"{self.models_dir} holds {', '.join(known)}" if known else f"{self.models_dir} is empty"
        raise UserError(
            f"model: there is no model {self.model!r}: {have}. `tuneserve pull {self.model}` gets one; "
            "or name a folder in Hugging Face's or Meta's format",
            param="model",
        )

    @property
    def model_name(self) -> str:
        """The public name of the base model."""
        return self.model if self._registered else self.model_dir.name

    @property
    def _registered(self) -> tuple[Path, ...]:
        """The folder that POST /models gave the name to, where it is still there."""
        folder = registered_folder(self.database, self.model)
        return () if folder is None or not is_model_folder(self.home / folder) else (self.home / folder,)


def load_settings(
    config: Path | None = None, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None
) -> Settings:
    """Raises UserError with the field, its value and what is allowed.

    `environ` is the process's environment; variables with our prefix that name no setting are left alone, since
    container platforms set such ones on their own.
    """
    data = {**(read_config(config) if config else {}), **_from_environment(environ or {}), **(overrides or {})}
    settings = parse_options(Settings, data)
    key_file = settings.api_key_file and user_path(settings.api_key_file)
    return settings.model_copy(
        update={
            "home": user_path(settings.home).resolve(),
            "state_dir": settings.state_dir and user_path(settings.state_dir).resolve(),
            "api_keys": (*settings.api_keys, *(read_key_file(key_file) if key_file else ())),
        }
    )


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    names = {f"{PREFIX}{name.upper()}": name for name in Settings.model_fields}
    return {name: _scalar(name, environ[variable]) for variable, name in names.items() if variable in environ}


def _scalar(name: str, text: str) -> Any:
    if Settings.model_fields[name].annotation is str or name in SECRETS:
        return text
    try:
        return yaml.load(text, Loader=ConfigLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{PREFIX}{name.upper()}: {text!r} cannot be read: {error}", param=name) from error
