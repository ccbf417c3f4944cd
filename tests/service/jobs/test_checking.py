from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from lm.errors import UserError
from service.jobs.checking import SMALL_BYTES, check_files_aside
from tests.support.processes import children_of

GOOD = '{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize("size", [0, SMALL_BYTES + 1], ids=["small", "large"])
def test_a_file_that_cannot_be_read_is_a_mistake_with_its_name(tmp_path: Path, size: int) -> None:
    """As when it is deleted, or closed to the service, between the request and the check."""
    first = tmp_path / "first.jsonl"
    first.write_text(GOOD * (1 + size // len(GOOD)))
    files = [(first, "first.jsonl"), (tmp_path / "gone.jsonl", "sub/gone.jsonl")]
    with pytest.raises(UserError, match=r"^data: cannot read the data file sub/gone\.jsonl: No such") as error:
        asyncio.run(check_files_aside(files, param="data"))
    assert error.value.param == "data"


def test_a_check_that_is_killed_is_no_mistake_in_the_file(tmp_path: Path) -> None:
    large = tmp_path / "large.jsonl"
    large.write_text(GOOD * (20 * SMALL_BYTES // len(GOOD)))

    async def work() -> None:
        before = children_of(os.getpid())
        check = asyncio.create_task(check_files_aside([(large, "large.jsonl")], param="data"))
        while not (helpers := [child for child in children_of(os.getpid()) if child not in before]):
            await asyncio.sleep(0.01)
        os.kill(helpers[0], signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            await check

    asyncio.run(work())
