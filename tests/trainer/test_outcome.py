from __future__ import annotations

import errno

import pytest
import torch

from lm.errors import NotFoundError, UserError
from trainer.config import RunConfig
from trainer.data.errors import DataError
from trainer.option_groups import DpoConfig
from trainer.outcome import Cancelled, NoDiskSpace, NonFiniteLoss, result_of
from trainer.run_folder import RunResult

CONFIG = RunConfig(model="model", data_files=("data.json",), recipe="full", batch_size=16)


@pytest.mark.parametrize(
    ("error", "code", "param"),
    [
        (UserError("bad", param="epochs"), "invalid_config", "epochs"),
        (NotFoundError("no model"), "invalid_config", None),
        (DataError("record 3", param="max_seq_len"), "invalid_training_file", "max_seq_len"),
        (NonFiniteLoss("step 3"), "non_finite_loss", "learning_rate"),
        (NoDiskSpace("1 GB"), "no_disk_space", None),
        (OSError(errno.ENOSPC, "No space left on device"), "no_disk_space", None),
        (OSError(errno.EACCES, "Permission denied"), "internal_error", None),
        (ZeroDivisionError("division by zero"), "internal_error", None),
    ],
)
def test_an_error_has_a_code(error: Exception, code: str, param: str | None) -> None:
    result = result_of(error, CONFIG)
    assert (result.status, result.error_code, result.error_param) == ("failed", code, param)
    assert str(error) in str(result.error_message)


def test_an_unexpected_error_is_named_by_its_last_line() -> None:
    assert result_of(KeyError("x"), None).error_message == "KeyError: 'x'"
    assert result_of(AssertionError(), None).error_message == "AssertionError"


def test_a_cancelled_run_has_no_error() -> None:
    assert result_of(Cancelled("SIGTERM"), CONFIG) == RunResult(status="cancelled")


def test_memory_that_runs_out_without_a_word_is_told_in_words() -> None:
    assert str(result_of(MemoryError(), CONFIG).error_message).startswith("no memory is left. To use less memory: ")


def test_memory_that_runs_out_comes_with_figures_and_what_to_lower() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    for error in (caught.value, torch.OutOfMemoryError("tried to allocate 4503599627370496 bytes")):
        result = result_of(error, CONFIG)
        assert result.error_code == "out_of_memory"
        message = str(result.error_message)
        assert "tried to allocate 4503599627370496 bytes" in message
        assert "lower batch_size (now 16) and raise gradient_accumulation_steps" in message
        assert "lower max_seq_len (now 1024)" in message
        assert "enable_activation_checkpointing" in message
        assert "lora recipe" in message


def test_dpo_of_the_whole_model_is_told_of_the_adapter() -> None:
    config = RunConfig(model="model", data_files=("data.json",), recipe="dpo", dpo=DpoConfig(update="full"))
    assert str(result_of(MemoryError(), config).error_message).endswith("; or set dpo.update to lora")
