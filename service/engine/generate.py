"""`python -m service.engine.generate`: one answer to one prompt, by the engine that serves, without a service.

The GenerationConfig comes as JSON on stdin, the text goes to stdout as it comes. The log on stderr has torchtune's lines
in torchtune's order, then our own.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Before torch is imported, which reads it
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # a broken torch_npu would fail the import

import torch

from lm.config import load_config
from lm.device import choose_dtype, memory_figures, reset_peak_memory, resolve_device
from lm.errors import UserError
from lm.template import load_template
from lm.tokenizer import Tokenizer, load_tokenizer
from service.detokenizer import IncrementalDecoder
from service.engine.core import Engine
from service.engine.messages import (
    AddRequest,
    EngineConfig,
    LoadModel,
    ModelLoaded,
    ModelLoadFailed,
    RequestFailed,
    RequestTiming,
    SamplingParams,
    StepOutput,
    TokenOutput,
)
from service.engine.setup import build_engine
from trainer.torchtune.generation import GenerationConfig

log = logging.getLogger(__name__)

NAME = "generate"
PREFILL_CHUNK = 1024
"""Nobody else waits for a step here, so a chunk may be longer than where many are served."""
USER_ERROR = 2
INTERRUPTED = 130

Write = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, in the model's own tokens."""

    ids: list[int]
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One answer, and what it took."""

    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    """The token that ended the answer included."""
    text: str
    timing: RequestTiming
    model_bytes: int
    """Weights and the cache of this request, which are torchtune's parameters and buffers."""
    peak_memory_bytes: int
    device: str

    @property
    def seconds(self) -> float:
        """Of the whole inference: prefill, decoding, sampling. Loading and tokenizing come before."""
        return self.timing.queue_s + self.timing.prefill_s + self.timing.decode_s

    def log_lines(self) -> list[str]:
        """torchtune's three lines by torchtune's formulas (generate.py), then first token and decoding by themselves.

        `Memory used` is the true peak, of the allocator or, on the CPU, of the process; decimal GB as there.
        """
        speed, first = len(self.token_ids) / self.seconds, self.timing.queue_s + self.timing.prefill_s
        return [
            f"Time for inference: {self.seconds:.02f} sec total, {speed:.02f} tokens/sec",
            f"Bandwidth achieved: {self.model_bytes * speed / 1e9:.02f} GB/s",
            f"Memory used: {self.peak_memory_bytes / 1e9:.02f} GB",
            f"Time to first token: {first:.03f} sec for {self.num_prompt_tokens} tokens of prompt",
            self._decode_line(),
        ]

    def _decode_line(self) -> str:
        timing = self.timing
        if timing.decode_tokens == 0:
            return "Decode only: no token after the first"
        speed, bandwidth = timing.decode_tokens / timing.decode_s, timing.decode_bytes / timing.decode_s
        return f"Decode only: {speed:.02f} tokens/sec, {bandwidth / 1e9:.02f} GB/s read"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("service.engine").setLevel(logging.WARNING)  # what a service tells of itself
    config = GenerationConfig.model_validate_json(sys.stdin.buffer.read())
    try:
        generate(config, _print)
    except UserError as error:
        print(f"tuneserve: error: {error}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # whoever read the text has gone
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def generate(config: GenerationConfig, write: Write) -> Generated:
    """Answer the prompt of `config` on the device that it names, and log the figures. `write` gets the text as it comes.

    Raises UserError for what cannot be used: the device, the model folder, a prompt that does not fit.
    """
    choice = resolve_device(config.device)
    device = choice.device
    log.info(f"Device: {device} ({choice.name}). {choice.reason}")
    reset_peak_memory(device)
    prompt = _encode(config)
    engine, loaded = _load(config, len(prompt.ids))
    log.info(f"Model is initialized with precision {choose_dtype(engine.ready.dtype, device).dtype}.")
    token_ids, text, timing = _run(engine, config, prompt, write)
    generated = Generated(
        num_prompt_tokens=len(prompt.ids),
        token_ids=token_ids,
        text=text,
        timing=timing,
        model_bytes=loaded.weight_bytes + _cache_bytes(engine, Path(config.model_dir)),
        peak_memory_bytes=memory_figures(device).peak_allocated,
        device=str(device),
    )
    for line in generated.log_lines():
        log.info(line)
    return generated


def _encode(config: GenerationConfig) -> Prompt:
    folder = Path(config.model_dir)
    tokenizer = load_tokenizer(folder, None if config.tokenizer_file is None else Path(config.tokenizer_file))
    template = load_template(folder, tokenizer)
    log.info(f"Tokenizer is initialized from {tokenizer.origin}, chat template: {template.origin}.")
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    ids = template.encode([*system, {"role": "user", "content": config.user}], add_generation_prompt=True)
    context = load_config(folder).max_position_embeddings
    if len(ids) + config.max_new_tokens > context:
        raise UserError(
            f"max_new_tokens: {len(ids)} tokens of prompt and {config.max_new_tokens} for the answer exceed the model's "
            f"context of {context}: lower max_new_tokens to {max(0, context - len(ids))}, or shorten the prompt",
            param="max_new_tokens",
        )
    return Prompt(ids=ids, tokenizer=tokenizer)


def _load(config: GenerationConfig, num_prompt_tokens: int) -> tuple[Engine, ModelLoaded]:
    """An engine just large enough for the request, with the weights in it."""
    awake = threading.Event()
    engine = build_engine(
        EngineConfig(
            device=config.device,
            dtype=config.dtype,
            base_dir=config.model_dir,
            max_num_seqs=1,
            max_model_len=num_prompt_tokens + config.max_new_tokens,
            max_num_batched_tokens=1 + min(PREFILL_CHUNK, num_prompt_tokens),
            swap="drain",  # no second set will come, so none needs room
        ),
        wake=awake.set,
    )
    engine.handle(LoadModel(model_id=NAME, base_dir=config.model_dir))
    while True:
        for event in engine.take_events():
            if isinstance(event, ModelLoaded):
                return engine, event
            if isinstance(event, ModelLoadFailed):
                raise UserError(event.message, param="model")
        awake.wait()
        awake.clear()
        engine.step()


def _run(
    engine: Engine, config: GenerationConfig, prompt: Prompt, write: Write
) -> tuple[tuple[int, ...], str, RequestTiming]:
    """Ids, text and timing of the answer."""
    decoder = IncrementalDecoder(prompt.tokenizer.decode)
    token_ids: list[int] = []
    pieces: list[str] = []
    engine.handle(AddRequest(request_id=NAME, model_id=NAME, prompt_ids=prompt.ids, sampling=_sampling(config, prompt)))
    while True:
        for output in _outputs(engine):
            token_ids += output.token_ids
            shown = output.token_ids if output.stop_token_id is None else output.token_ids[:-1]
            pieces.append("".join(map(decoder.add, shown)))
            write(pieces[-1])
            if output.timing is not None:
                pieces.append(decoder.flush())
                write(pieces[-1] + "\n")
                return tuple(token_ids), "".join(pieces), output.timing
        engine.step()


def _outputs(engine: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    for event in engine.take_events():
        if isinstance(event, RequestFailed):
            raise UserError(event.message)
        if isinstance(event, StepOutput):
            outputs += event.outputs
    return outputs


def _sampling(config: GenerationConfig, prompt: Prompt) -> SamplingParams:
    return SamplingParams(
        max_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or 0,
        seed=secrets.randbits(31) if config.seed is None else config.seed,
        stop_token_ids=prompt.tokenizer.eos_token_ids,
    )


def _cache_bytes(engine: Engine, folder: Path) -> int:
    ready = engine.ready
    itemsize = choose_dtype(ready.dtype, torch.device(ready.device)).dtype.itemsize
    return ready.num_blocks * ready.block_size * load_config(folder).kv_bytes_per_token(itemsize)


def _print(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # taking torch down takes a second, and there is nothing to save
