"""Grammars of users, tried in a process of its own before anything is queued.

llguidance bounds most of what a grammar costs, but not all: some make it compute for hours, some overflow its stack, and
no thread can be stopped. So `python -m service.grammar_checker FOLDER VOCAB_SIZE` compiles them first, as the engine
would; one that kills it, or that its alarm ends, is refused. It reads grammars as lines of JSON from standard input and
answers each with a line: the mistake, or null.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import signal
import sys
from collections import OrderedDict
from pathlib import Path

from lm.errors import UserError
from service.engine.grammar import GrammarCompiler
from service.jobs.trainer_process import trainer_environment

CHECK_SECONDS = 4
MAX_KNOWN = 1024
"""Grammars whose outcome is remembered."""
TOO_DEEP = "it is too deep to compile"
DEATHS: dict[int, str] = {
    signal.SIGALRM: f"it takes more than {CHECK_SECONDS} s to compile",
    signal.SIGSEGV: TOO_DEEP,
    signal.SIGBUS: TOO_DEEP,
    signal.SIGABRT: TOO_DEEP,
}
"""By signal: what the grammar did that the process died of it."""
HARMLESS = 'start: "a"'


class GrammarChecker:
    """For one model folder. The process starts with the first grammar; use on one event loop."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._command = (sys.executable, "-P", "-m", __name__, str(folder), str(vocab_size))
        self.process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def find_mistake(self, grammar: str) -> str | None:
        """Why the engine could not follow `grammar`; None if it can.

        Raises ChildProcessError when the process cannot be started, or is killed.
        """
        key = hashlib.sha256(grammar.encode()).digest()
        if key not in self._known:
            async with self._lock:
                if key not in self._known:
                    self._known[key] = await self._ask(grammar)
        self._known.move_to_end(key)
        mistake = self._known[key]
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return mistake

    async def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    async def _ask(self, grammar: str) -> str | None:
        try:
            if self.process is None or self.process.returncode is not None:
                await self.close()
                await self._start()
            if (answer := await self._exchange(grammar)) is not None:
                mistake: str | None = json.loads(answer)
                return mistake
        except BaseException:  # cancelled, for one: the answer would be taken for that to the next question
            await self.close()
            raise
        assert self.process is not None
        code = await self.process.wait()
        await self.close()
        if -code not in DEATHS:
            raise ChildProcessError(f"the process that checks grammars ended with exit code {code}")
        return DEATHS[-code]

    async def _start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=trainer_environment(),
        )
        if await self._exchange(HARMLESS) is None:
            raise ChildProcessError("the process that checks grammars ends at once")

    async def _exchange(self, grammar: str) -> bytes | None:
        """The answer; None if the process died of the question."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(grammar).encode() + b"\n")
        return await self.process.stdout.readline() or None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # dying is part of the work
    folder, vocab_size = sys.argv[1:]
    compiler = GrammarCompiler(Path(folder), int(vocab_size))
    _check(compiler, HARMLESS)  # reads the tokenizer, before any alarm
    for line in sys.stdin:
        signal.alarm(CHECK_SECONDS)
        mistake = _check(compiler, json.loads(line))
        signal.alarm(0)
        print(json.dumps(mistake), flush=True)


def _check(compiler: GrammarCompiler, grammar: str) -> str | None:
    try:
        compiler.build(grammar)
    except UserError as error:
        return str(error)
    return None


if __name__ == "__main__":
    main()
