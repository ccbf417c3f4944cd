"""How a run ends: what can end it early, and what its result says then. Torch-free."""

from __future__ import annotations

import errno

from lm.errors import UserError
from trainer.config import RunConfig
from trainer.data.errors import DataError
from trainer.run_folder import RunResult


class Cancelled(Exception):
    """Somebody asked the run to stop."""


class Paused(Exception):
    """Somebody asked the run to stop in such a way that it can go on later."""


class NonFiniteLoss(Exception):
    """The loss or the norm of the gradients is NaN or infinite."""


class NoDiskSpace(Exception):
    """The checkpoints of the run will not fit."""


def result_of(error: Exception, config: RunConfig | None) -> RunResult:
    """The result of a run that `error` ended. `config` is None where the error is in the config."""
    if isinstance(error, Cancelled):
        return RunResult(status="cancelled")
    if isinstance(error, Paused):
        return RunResult(status="paused")
    if isinstance(error, UserError):
        code = "invalid_training_file" if isinstance(error, DataError) else "invalid_config"
        return _failed(code, str(error), error.param)
    if isinstance(error, NonFiniteLoss):
        return _failed("non_finite_loss", str(error), "learning_rate")
    if isinstance(error, NoDiskSpace) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return _failed("no_disk_space", str(error))
    if is_out_of_memory(error) and config is not None:
        return _failed("out_of_memory", f"{str(error) or 'no memory is left'}. {_memory_advice(config)}")
    return _failed("internal_error", f"{type(error).__name__}: {error}".removesuffix(": "))


def is_out_of_memory(error: Exception) -> bool:
    """By name, since torch and torch_npu have exceptions of their own and the CPU's allocator a bare RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def _memory_advice(config: RunConfig) -> str:
    advice = [
        f"lower batch_size (now {config.batch_size}) and raise gradient_accumulation_steps instead",
        f"lower max_seq_len (now {config.max_seq_len})",
    ]
    if not config.enable_activation_checkpointing:
        advice.append("set enable_activation_checkpointing")
    if config.recipe == "full":
        advice.append("take the lora recipe")
    elif not config.trains_adapter:
        advice.append("set dpo.update to lora")
    return f"To use less memory: {'; or '.join(advice)}"


def _failed(code: str, message: str, param: str | None = None) -> RunResult:
    return RunResult(status="failed", error_code=code, error_message=message, error_param=param)
