"""Calls in the text of an answer: the same for every way in which the text is split, and nothing else is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat
from service.tools.parser import ArgumentsDelta, CallStart, ContentDelta, Delta, ToolParser

NAMES = ("f", "get_weather", "get_time")
FORMATS = (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)


@dataclass(frozen=True)
class Told:
    content: str
    calls: tuple[tuple[str, str], ...]


def told(deltas: list[Delta]) -> Told:
    content, ids = "", set()
    calls: list[list[str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content += text
            case CallStart(index, call_id, name):
                assert index == len(calls)
                ids.add(call_id)
                calls.append([name, ""])
            case ArgumentsDelta(index, text):
                assert index == len(calls) - 1
                calls[index][1] += text
    assert len(ids) == len(calls)
    return Told(content, tuple((name, arguments) for name, arguments in calls))


def parse(format: str | None, *pieces: str, max_calls: int | None = None) -> Told:
    parser = ToolParser(format, NAMES, max_calls)
    deltas = [delta for piece in pieces for delta in parser.add(piece)]
    return told(deltas + parser.flush())


WEATHER = '{"city": "北京 } \\" {", "days": [1, {"a": null}]}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>'
CASES: dict[str, tuple[str, str, str, list[tuple[str, str]]]] = {
    # format, text, content, calls
    "hermes": ("hermes", HERMES_CALL, "", [("get_weather", WEATHER)]),
    "two, with a text before them": (
        "hermes",
        f'I see.\n{HERMES_CALL}\n<tool_call>{{"name":"f","arguments":{{}}}}</tool_call>\n',
        "I see.\n",
        [("get_weather", WEATHER), ("f", "{}")],
    ),
    "white space around calls": (
        "hermes",
        f"\n\n {HERMES_CALL}\n \n{HERMES_CALL}\n",
        "",
        [("get_weather", WEATHER)] * 2,
    ),
    "a text behind": ("hermes", f"{HERMES_CALL}\n Done. \n", "\n Done. \n", [("get_weather", WEATHER)]),
    "arguments before the name": (
        "hermes",
        f'<tool_call>{{"arguments": {WEATHER}, "name": "get_weather"}}</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    "no arguments": ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
    "type and id": (
        "hermes",
        '<tool_call>{"type": "function", "id": "a-1", "name": "f", "arguments": {"a": 1}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "parameters": ("hermes", '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", [("f", '{"a": 1}')]),
    "without the closing tag": ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    "a text in place of the closing tag": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}} and',
        " and",
        [("f", "{}")],
    ),
    "cut in the arguments": ("hermes", '<tool_call>{"name": "f", "arguments": {"a": [1, ', "", [("f", '{"a": [1, ')]),
    "cut in the closing tag": ("hermes", '<tool_call>{"name": "f", "arguments": {}}\n</tool', "", [("f", "{}")]),
    "cut before the arguments": (
        "hermes",
        'Hm. <tool_call>{"name": "f", "arg',
        'Hm. <tool_call>{"name": "f", "arg',
        [],
    ),
    "cut in the opening": ("hermes", "a < b <tool_", "a < b <tool_", []),
    "an opening that opens nothing, twice": (
        "hermes",
        f"<tool_call>\n<tool_call>no {HERMES_CALL}",
        "<tool_call>\n<tool_call>no ",
        [("get_weather", WEATHER)],
    ),
    "a call that begins within a broken one": (
        "hermes",
        f'<tool_call>{{"name": {HERMES_CALL}',
        '<tool_call>{"name": ',
        [("get_weather", WEATHER)],
    ),
    "llama3": ("llama3", f'{{"name": "get_weather", "parameters": {WEATHER}}}', "", [("get_weather", WEATHER)]),
    "llama3, several": (
        "llama3",
        '\n\n{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {}};{"name": "get_time"}\n{"name": "f"}',
        "",
        [("f", '{"a": 1}'), ("f", "{}"), ("get_time", "{}"), ("f", "{}")],
    ),
    "llama3, with its tag": (
        "llama3",
        'Let me see. <|python_tag|>{"name": "f", "parameters": {"a": 1}}',
        "Let me see. ",
        [("f", '{"a": 1}')],
    ),
    "llama3, a tag before code": ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    "llama3, JSON that is no call": ("llama3", '{"name": "Ada", "age": 36}', '{"name": "Ada", "age": 36}', []),
    "llama3, not at the beginning": (
        "llama3",
        'It is {"name": "f", "parameters": {}}',
        'It is {"name": "f", "parameters": {}}',
        [],
    ),
    "llama3, a text behind": ("llama3", '{"name": "f"}; and then', "; and then", [("f", "{}")]),
    "mistral": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "f", "arguments": {{}}, "id": "abcdefghi"}}]',
        "",
        [("get_weather", WEATHER), ("f", "{}")],
    ),
    "mistral, a text before and behind": (
        "mistral",
        'Now.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}] Then.',
        "Now. Then.",
        [("f", '{"a": 1}')],
    ),
    "mistral, an empty list": ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    "mistral, no end of the list": ("mistral", '[TOOL_CALLS][{"name": "f"}', "", [("f", "{}")]),
    "mistral_args": (
        "mistral_args",
        f'[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]f[CALL_ID]a_1[ARGS] {{"b": 2}} Ok',
        " Ok",
        [("get_weather", WEATHER), ("f", '{"b": 2}')],
    ),
    "mistral_args, an unknown name": ("mistral_args", "[TOOL_CALLS]g[ARGS]{}", "[TOOL_CALLS]g[ARGS]{}", []),
}
MALFORMED = (
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "get", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": f, "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "extra": 1, "arguments": {}}</tool_call>',
    '<tool_call>{"type": "custom", "name": "f"}</tool_call>',
    "<tool_call>f()</tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>{}</tool_call>",
    f'<tool_call>{{"id": "{"x" * 65}", "name": "f"}}</tool_call>',
)


@pytest.mark.parametrize("case", CASES)
def test_calls_and_content_are_told_apart_in_any_split(case: str) -> None:
    format, text, content, calls = CASES[case]
    expected = Told(content, tuple(calls))
    assert parse(format, text) == expected
    assert parse(format, *text) == expected
    for cut in range(len(text)):
        assert parse(format, text[:cut], text[cut:]) == expected


@pytest.mark.parametrize("text", MALFORMED)
def test_what_is_no_call_is_content_to_the_last_letter(text: str) -> None:
    for whole in (text, f"Well. {text} So."):
        assert parse("hermes", whole) == parse("hermes", *whole) == Told(whole, ())


@pytest.mark.parametrize("format", [*(format.name for format in FORMATS), None])
def test_a_text_without_calls_passes_at_once(format: str | None) -> None:
    parser = ToolParser(format, NAMES)
    for piece in ("Hello", " world", "!\n", " a < b", " [1]", " {x}"):
        assert parser.add(piece) == [ContentDelta(piece)]
    assert parser.flush() == []
    assert parser.num_calls == 0


def test_without_a_format_everything_is_content() -> None:
    assert parse(None, HERMES_CALL) == Told(HERMES_CALL, ())


def test_only_what_may_begin_a_call_is_held_back() -> None:
    parser = ToolParser("hermes", NAMES)
    assert parser.add("Yes.") == [ContentDelta("Yes.")]
    assert parser.add(" <tool") == [ContentDelta(" ")]
    assert parser.add("s> <tool_call>\n{") == [ContentDelta("<tools> ")]
    assert parser.add('"name": "get_') == []
    assert parser.add('tomorrow"') == [ContentDelta('<tool_call>\n{"name": "get_tomorrow"')]


def test_arguments_are_told_as_they_come() -> None:
    parser = ToolParser("hermes", NAMES)
    assert parser.add('<tool_call>\n{"name": "f", "arguments": ') == []
    start, begin = parser.add('{"te')
    assert isinstance(start, CallStart)
    assert (start.index, start.id[:5], start.name, begin) == (0, "call_", "f", ArgumentsDelta(0, '{"te'))
    assert parser.add('xt": "<tool_call> }') == [ArgumentsDelta(0, 'xt": "<tool_call> }')]
    assert parser.add('"}}\n</tool_call>') == [ArgumentsDelta(0, '"}')]
    assert parser.flush() == []


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("hermes", f'{HERMES_CALL}\n<tool_call>{{"name": "f"}}</tool_call> x'),
        ("llama3", f'{{"name": "get_weather", "parameters": {WEATHER}}}; {{"name": "f"}} x'),
        ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {WEATHER}}}, {{"name": "f"}}] x'),
        ("mistral_args", f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]f[ARGS]{{}} x"),
    ],
)
def test_calls_beyond_the_limit_are_left_out(format: str, text: str) -> None:
    expected = Told(" x", (("get_weather", WEATHER),))
    assert parse(format, text, max_calls=1) == parse(format, *text, max_calls=1) == expected


@pytest.mark.parametrize("cut", ["<tool_", '<tool_call>\n{"name": "get_', '<tool_call>\n{"name": "f", "arguments'])
def test_a_call_that_must_be_and_is_cut_off_is_no_content(cut: str) -> None:
    parser = ToolParser("hermes", NAMES, must_call=True)
    assert told(parser.add(f"{HERMES_CALL}\n{cut}") + parser.flush()) == Told("", (("get_weather", WEATHER),))
    assert ToolParser("hermes", NAMES, must_call=True).add(cut) == []


# ---- in general

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), JSON, max_size=3)), min_size=1)
FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "[", "]", "{", "}", ";", ",", ":"),
        *('"name"', '"arguments"', '"parameters"', '"f"', '"g"', "f", '"', "\\", " ", "\n", "word", "北京", "<", "{}"),
        *('{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"a": 1}}', '[{"name": "f"}]', '"id"', '"x"'),
    ]
)


def written(format: ToolFormat, calls: list[tuple[str, str]]) -> str:
    return format.begin + format.separator.join(format.write(*call) for call in calls) + format.end


def cut(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(st.sampled_from(FORMATS), CALLS, st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_calls_come_back_as_they_were_written(
    format: ToolFormat, calls: list[tuple[str, dict[str, Any]]], ascii_only: bool, data: st.DataObject
) -> None:
    texts = [(name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]
    text = written(format, texts)
    assert parse(format.name, *cut(text, data)) == Told("", tuple(texts))


@given(st.sampled_from(FORMATS), st.lists(FRAGMENTS, max_size=30), st.data())
@settings(max_examples=400, deadline=None)
def test_any_text_gives_the_same_in_every_split_and_loses_only_what_calls_are_made_of(
    format: ToolFormat, fragments: list[str], data: st.DataObject
) -> None:
    text = "".join(fragments)
    whole = parse(format.name, text)
    assert parse(format.name, *cut(text, data)) == parse(format.name, *text) == whole
    if not whole.calls:
        assert whole.content == text
    at = 0
    for char in whole.content:  # content is what is left of the text, in its order
        at = text.index(char, at) + 1
