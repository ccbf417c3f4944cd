"""Grammars that only llguidance can judge, tried in the process that may die of them."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from service.grammar_checker import CHECK_SECONDS, GrammarChecker
from service.structured_output import Constraint, check_constraint, json_schema, lark_or_gbnf, regex
from tests.support.tiny import VOCAB_SIZE, write_tiny_tokenizer

PARAM = "field"

Find = Callable[[Constraint], Awaitable[None]]


@asynccontextmanager
async def checking(folder: Path) -> AsyncIterator[Find]:
    checker = GrammarChecker(folder, VOCAB_SIZE)
    try:
        yield lambda constraint: check_constraint(constraint, checker)
    finally:
        await checker.close()


def check_all(folder: Path, *constraints: Constraint) -> list[str | None]:
    """Of each what is wrong with it."""

    async def check() -> list[str | None]:
        mistakes: list[str | None] = []
        async with checking(folder) as find:
            for constraint in constraints:
                try:
                    await find(constraint)
                    mistakes.append(None)
                except UserError as error:
                    mistakes.append(str(error) if error.param == constraint.param else f"of {error.param}")
        return mistakes

    return asyncio.run(check())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return folder


def chain(rule: str) -> str:
    last = 5000
    rules = "\n".join(f"{rule}{index}: {rule}{index + 1}" for index in range(last))
    return f'start: {rule}0\n{rules}\n{rule}{last}: "x"'


REFUSED = [
    (regex("a(b", param=PARAM), "unclosed group"),
    (regex(r"(a)\1", param=PARAM), "backreferences are not supported"),
    (regex("(?=a)b", param=PARAM), "look-around"),
    (regex("(" * 3000 + ")" * 3000, param=PARAM), "nest"),
    (regex("[^\\s\\S]", param=PARAM), "no text follows it"),
    (
        json_schema({"type": "array", "uniqueItems": True}, param=PARAM, strict=True),
        "uniqueItems cannot be enforced while an answer is made: remove it, or leave out strict to have it ignored",
    ),
    (json_schema({"not": {}}, param=PARAM), "not cannot be enforced while an answer is made: remove it"),
    (json_schema({"type": "string", "format": "iri"}, param=PARAM), "the format iri cannot be enforced: remove it"),
    (json_schema({"oneOf": [{"type": "object"}, {"required": ["a"]}]}, param=PARAM), "oneOf cannot be enforced"),
    (json_schema({"type": "string", "maxLength": -1}, param=PARAM), "maxLength"),
    (json_schema({"type": "nonsense"}, param=PARAM), "nonsense"),
    (json_schema({"$ref": "#"}, param=PARAM), "no text follows it"),
    (json_schema({"$ref": "#/$defs/nothing"}, param=PARAM), "nothing"),
    (json_schema({"allOf": [{"type": "string"}, {"type": "integer"}]}, param=PARAM), "Unsatisfiable schema"),
    (json_schema({"minimum": float("nan")}, param=PARAM), ""),
    (lark_or_gbnf("start: <|nope|>", param=PARAM), "unknown special token"),
    (lark_or_gbnf('start: "a" @x', param=PARAM), ""),
    (lark_or_gbnf('%import "/etc/passwd"\nstart: "a"', param=PARAM), "Expected"),
    (lark_or_gbnf("start: " + "(" * 20_000, param=PARAM), "deeply nested"),
]


@pytest.fixture(scope="module")
def refusals(folder: Path) -> list[str | None]:
    """What is said of each of REFUSED."""
    return check_all(folder, *(constraint for constraint, _ in REFUSED))


@pytest.mark.parametrize("index", range(len(REFUSED)))
def test_what_llguidance_refuses_is_told_in_one_line(refusals: list[str | None], index: int) -> None:
    mistake = refusals[index]
    assert mistake is not None
    assert mistake.startswith(f"{PARAM}: ")
    assert REFUSED[index][1] in mistake
    assert "\n" not in mistake
    assert len(mistake) < 500


@pytest.mark.parametrize(
    "bomb",
    [
        json_schema({"type": "integer", "multipleOf": 999983}, param=PARAM),
        json_schema({"allOf": [{"type": "string", "pattern": f"a{i}.*"} for i in range(250)]}, param=PARAM),
        json_schema(
            {"$defs": {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1300)} | {"d1300": {"const": 1}},
             "allOf": [{"$ref": "#/$defs/d0"}]},
            param=PARAM,
        ),
        lark_or_gbnf(chain("a"), param=PARAM),
        lark_or_gbnf(chain("A"), param=PARAM),
        regex("((a{1000}){1000}){1000}", param=PARAM),
        json_schema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}, param=PARAM),
        json_schema({"type": "string", "minLength": 2**31, "maxLength": 2**32}, param=PARAM),
        json_schema({"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(2000)}}, param=PARAM),
        lark_or_gbnf("start: A\nA: " + " & ".join(f"/(.*{c}){{30}}/" for c in "abcdefgh"), param=PARAM),
        lark_or_gbnf('start: s\ns: s s | s s s | /./ | ""', param=PARAM),
        lark_or_gbnf("start: a{100000}\na: /b{100000}/ | a a", param=PARAM),
    ],
)  # fmt: skip
def test_no_grammar_holds_up_the_service_or_ends_it(folder: Path, bomb: Constraint) -> None:
    begin = time.perf_counter()
    mistake, fine = check_all(folder, bomb, regex("a", param=PARAM))
    assert fine is None
    print(mistake)
    assert mistake is None or mistake.startswith(PARAM)
    assert time.perf_counter() - begin < CHECK_SECONDS + 20  # two starts of the process


def test_nothing_is_fetched_for_a_schema(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        schemas: list[dict[str, Any]] = [{"$schema": f"{url}/m.json", "type": "string"}, {"$id": f"{url}/s.json", "$ref": "#/$defs/a"},
                   {"$dynamicRef": f"{url}/x.json"}, {"$defs": {"a": {"$id": f"{url}/y.json"}}, "$ref": "#/$defs/a"}]  # fmt: skip
        check_all(folder, *(json_schema(schema, param=PARAM) for schema in schemas))
        with pytest.raises(TimeoutError):
            listening.accept()


def test_what_was_checked_once_is_remembered_and_a_cancelled_check_does_not_mix_up_answers(folder: Path) -> None:
    bomb = json_schema({"type": "integer", "multipleOf": 999983}, param=PARAM)
    bad, good = regex("a(", param=PARAM), regex("a", param=PARAM)

    async def check() -> None:
        async with checking(folder) as find:
            with pytest.raises(UserError):
                await find(bad)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(find(bomb), 0.5)
            await find(good)
            begin = time.perf_counter()
            for _ in range(100):
                with pytest.raises(UserError):
                    await find(bad)
            assert time.perf_counter() - begin < 0.5

    asyncio.run(check())


def test_a_checker_that_was_killed_is_started_again(folder: Path) -> None:
    async def check() -> None:
        checker = GrammarChecker(folder, VOCAB_SIZE)
        assert await checker.find_mistake(regex("a", param=PARAM).grammar) is None
        assert checker.process is not None
        checker.process.kill()
        await checker.process.wait()
        assert await checker.find_mistake(regex("b", param=PARAM).grammar) is None
        checker.process.send_signal(signal.SIGSTOP)
        asking = asyncio.create_task(checker.find_mistake(regex("c", param=PARAM).grammar))
        await asyncio.sleep(0.1)
        checker.process.kill()
        with pytest.raises(ChildProcessError, match="exit code -9"):
            await asking
        assert await checker.find_mistake(regex("c", param=PARAM).grammar) is None
        await checker.close()

    asyncio.run(check())
