"""Reading how a config rotates: every spelling, every type, and what is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lm.errors import UserError
from lm.rope import SUPPORTED_ROPE_TYPES, LinearRope, LlamaRope, YarnRope, read_rope

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LONGEST = 40_960


def yarn(**change: Any) -> YarnRope:
    _, scaling = read_rope({"rope_scaling": YARN | change}, LONGEST)
    assert isinstance(scaling, YarnRope)
    return scaling


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}, "rope_parameters": {"rope_type": "default"}},
    ],
)
def test_llama3_scaling_reads_the_same_in_every_spelling(config: dict[str, Any]) -> None:
    expected = LlamaRope(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    assert read_rope(config, 131_072) == (5e5, expected)


@pytest.mark.parametrize(
    "change", [{"rope_scaling": {"rope_type": "default"}}, {"rope_parameters": {}}, {"rope_scaling": None}, {}]
)
def test_plain_rope_reads_the_same_in_every_spelling(change: dict[str, Any]) -> None:
    assert read_rope({"rope_theta": 100_000} | change, 8192) == (100_000, None)
    assert read_rope(change, 8192) == (10_000, None)


def test_linear_scaling_has_a_factor() -> None:
    assert read_rope({"rope_scaling": {"type": "linear", "factor": 2}}, 4096) == (10_000, LinearRope(factor=2.0))


def test_yarn_has_the_recommended_values_where_it_says_nothing() -> None:
    assert yarn() == yarn(beta_fast=32, beta_slow=1, attention_factor=0.1 * math.log(4) + 1, truncate=True)


def test_yarn_reads_every_key() -> None:
    assert yarn(attention_factor=0.5, beta_fast=16, beta_slow=2, truncate=False) == YarnRope(
        factor=4.0,
        original_max_position_embeddings=32_768,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=0.5,
        truncate=False,
    )
    grown = 0.1 * math.log(4)
    assert yarn(mscale=1.0, mscale_all_dim=0.5).attention_factor == pytest.approx((grown + 1) / (grown / 2 + 1))
    assert yarn(mscale=1.0, mscale_all_dim=0).attention_factor == pytest.approx(grown + 1)
    assert yarn(factor=None).factor == LONGEST / 32_768
    assert yarn(factor=0.5).attention_factor == 1.0


def test_the_original_context_is_the_longest_unless_it_is_said() -> None:
    said: dict[str, Any] = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    for config, original in [(said, LONGEST), (said | {"original_max_position_embeddings": 4096}, 4096)]:
        _, scaling = read_rope(config, LONGEST)
        assert isinstance(scaling, YarnRope)
        assert scaling.original_max_position_embeddings == original


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional", "mrope", 3])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_another_type_is_refused_by_name(name: str, key: str, kind: Any) -> None:
    with pytest.raises(UserError) as caught:
        read_rope({name: {key: kind, "factor": 2.0}}, 4096)
    assert caught.value.param == f"{name}.{key}"
    assert f"one of the supported {list(SUPPORTED_ROPE_TYPES)} (got {kind!r})" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "param", "words"),
    [
        ({"rope_scaling": "llama3"}, "rope_scaling", "must be an object (got 'llama3')"),
        ({"rope_theta": float("inf")}, "rope_theta", "a positive number (got inf)"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.factor", "required and missing"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor", "a positive number (got '2')"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "rope_scaling.high_freq_factor",
            "more than low_freq_factor = 1.0 (got 1.0)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "must be 1: heads are rotated as a whole (got 0.5)"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor",
            "(got 0.25)",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention",
            "one set of rotary parameters must serve all layers",
        ),
        ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "rope_scaling.beta_fast", "at least beta_slow"),
        ({"rope_scaling": YARN | {"mscale": -1}}, "rope_scaling.mscale", "a positive number (got -1)"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "rope_scaling.truncate", "true or false (got 1)"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta", "more than 1 for yarn"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_by_name(config: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_rope(config, LONGEST)
    assert caught.value.param == param
    assert str(caught.value).startswith(f"{param}: ")
    assert words in str(caught.value)
