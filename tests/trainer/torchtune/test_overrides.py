"""Interpolation, overrides and bounded YAML."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from tests.support.json_fuzz import any_text, junk
from trainer.strict import read_config
from trainer.torchtune.overrides import apply_overrides, interpolate
from trainer.torchtune.reading import MAX_NODES, parse_yaml


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": "x", "b": "${a}/y"}, {"a": "x", "b": "x/y"}),
        ({"a": 3, "b": "${a}", "c": "n${a}"}, {"a": 3, "b": 3, "c": "n3"}),
        ({"a": {"b": {"c": [1]}}, "d": "${a.b.c}"}, {"a": {"b": {"c": [1]}}, "d": [1]}),
        ({"a": ["x", "y"], "b": "${a.1}"}, {"a": ["x", "y"], "b": "y"}),
        ({"a": "${b}", "b": "${c}", "c": 1}, {"a": 1, "b": 1, "c": 1}),
        ({"a": "b", "b": 7, "c": "${${a}}"}, {"a": "b", "b": 7, "c": 7}),
        ({"a": {"x": "${b}"}, "b": 1, "c": ["${a.x}"]}, {"a": {"x": 1}, "b": 1, "c": [1]}),
        (
            {"checkpointer": {"output_dir": "o"}, "p": "${output_dir}/t"},
            {"checkpointer": {"output_dir": "o"}, "p": "o/t"},
        ),
        (
            {"output_dir": "m", "checkpointer": {"output_dir": "o"}, "p": "${output_dir}"},
            {"output_dir": "m", "checkpointer": {"output_dir": "o"}, "p": "m"},
        ),
        ({"a": "$x {y}", "b": None}, {"a": "$x {y}", "b": None}),
    ],
)
def test_a_name_stands_for_its_value(data: dict[str, Any], expected: dict[str, Any]) -> None:
    assert interpolate(data) == expected


@pytest.mark.parametrize(
    ("data", "param", "words"),
    [
        ({"a": "${b}", "b": "${a}"}, "a", "circle: b -> a -> b"),
        ({"a": {"b": "${a}"}}, "a.b.b", "circle"),
        ({"path": "${paht}"}, "path", "did you mean path"),
        ({"a": {"b": 1}, "c": "${a.x}"}, "c", "no a.x"),
        ({"a": "${oc.env:HOME}"}, "a", "only names of this file"),
        ({"a": "${.b}", "b": 1}, "a", "only names of this file"),
        ({"a": "${}"}, "a", "only names of this file"),
        ({"a": "${b", "b": 1}, "a", "not closed"),
        ({"a": {"x": 1}, "b": "t${a}"}, "b", "no text"),
        ({"l": [1], "b": "${l.1}"}, "b", "no l.1"),
        ({f"a{n}": f"${{a{n + 1}}}" * 2 for n in range(40)} | {"a40": "x" * 100}, None, "becomes too long"),
        ({f"a{n}": [f"${{a{n + 1}}}"] * 2 for n in range(40)} | {"a40": 1}, None, "cannot be put in"),
    ],
)
def test_what_stands_for_nothing_is_an_error_at_its_place(data: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        interpolate(data)
    assert words in str(caught.value)
    assert param is None or caught.value.param == param


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a=1"], {"a": 1, "g": {"x": 1, "_component_": "c"}}),
        (["g.x=True", "n.m=[1, 2]"], {"a": 0, "g": {"x": True, "_component_": "c"}, "n": {"m": [1, 2]}}),
        (["a=yes"], {"a": True, "g": {"x": 1, "_component_": "c"}}),
        (["a="], {"a": None, "g": {"x": 1, "_component_": "c"}}),
        (["a=1e-5"], {"a": 1e-5, "g": {"x": 1, "_component_": "c"}}),
        (["a='#x: y=z'"], {"a": "#x: y=z", "g": {"x": 1, "_component_": "c"}}),
        (["a=${g.x}"], {"a": "${g.x}", "g": {"x": 1, "_component_": "c"}}),
        (["g=torch.optim.AdamW"], {"a": 0, "g": {"x": 1, "_component_": "torch.optim.AdamW"}}),
        (["~a"], {"g": {"x": 1, "_component_": "c"}}),
        (["~g.x", "a=2"], {"a": 2, "g": {"_component_": "c"}}),
        (["b=1", "~b"], {"a": 0, "g": {"x": 1, "_component_": "c"}}),
    ],
)
def test_overrides_set_and_remove(words: list[str], expected: dict[str, Any]) -> None:
    data = {"a": 0, "g": {"x": 1, "_component_": "c"}}
    assert apply_overrides(data, words) == expected
    assert data == {"a": 0, "g": {"x": 1, "_component_": "c"}}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("~b", "no 'b' to remove; at its top are a, g"),
        ("~g.y", "no 'g.y' to remove"),
        ("~a.b.c", "no 'a.b.c' to remove"),
        ("a", "written as key=value"),
        ("=1", "written as key=value"),
        ("--a=1", "written as key=value"),
        ("a.b=1", "a is not a group"),
        ("a=[1", "'[1' cannot be read"),
        ("a=!!python/name:os.system", "cannot be read"),
    ],
)
def test_an_override_that_says_nothing_clear_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides({"a": 0, "g": {"x": 1}}, [word])
    assert message in str(caught.value)


def test_yaml_is_read_as_torchtunes_users_write_it() -> None:
    text = "a: True\nb: off\nc: 2e-5\nd: null\ne: [\n  x,\n  y,\n]\nf: # nothing\ng: 你好\n"
    expected = {"a": True, "b": False, "c": 2e-5, "d": None, "e": ["x", "y"], "f": None, "g": "你好"}
    assert parse_yaml(text) == expected
    assert parse_yaml("# nothing") == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1]\nb: *x", "line 2: YAML aliases"),
        ("a: &x\n  b: *x", "aliases"),
        ("a: 1\na: 2", "'a' stands there twice"),
        ("- 1", "mapping"),
        ("just text", "mapping"),
        ("1: 2", "is no text"),
        ("a: 2024-01-01", "neither text"),
        ("a: 2024-13-41", "not valid YAML"),
        ("a: !!set {x}", "neither text"),
        ("a: !!binary aGk=", "neither text"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        ('a: "\\uD800"', "could be written as UTF-8"),
        ("a: 0x" + "f" * 5000, "a number beyond"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!float ''", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: " + "[" * 3000, "nested deeper"),
        ("a: [" + "1," * (MAX_NODES + 1) + "]", "more than"),
        ("a: " + "x" * 300_000, "too many"),
        ("? [a]\n: 1", ""),
        ("a: \0", "not valid YAML"),
    ],
)
def test_yaml_that_is_no_configuration_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@settings(max_examples=300, deadline=None, database=None)
@given(text=st.one_of(st.text(max_size=200), st.text(alphabet="ab:-[]{}&*!?|>'\"#$ \n0.~<,=%@`", max_size=80)))
def test_no_text_gets_past_as_anything_but_an_error_of_the_user(text: str) -> None:
    with contextlib.suppress(UserError):
        interpolate(parse_yaml(text))


@settings(max_examples=200, deadline=None, database=None)
@given(
    data=st.dictionaries(any_text, junk, max_size=4), words=st.lists(any_text | any_text.map("~{}".format), max_size=3)
)
def test_no_override_gets_past_as_anything_but_an_error_of_the_user(data: dict[str, Any], words: list[str]) -> None:
    with contextlib.suppress(UserError):
        interpolate(apply_overrides(data, words))


def test_our_own_reader_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: True\nb: 1e-4\nc: {d: [x]}\n")
    assert parse_yaml(path.read_text()) == read_config(path)
