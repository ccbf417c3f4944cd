"""The engine with a random model whose answers follow grammars: valid whatever it would have said."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lm.tokenizer import Tokenizer, load_tokenizer
from tests.support.engines import Driver, tiny_engine_config
from tests.support.json_schemas import random_schema
from tests.support.tiny import EOS, make_tiny_llama

CONTEXT = 4096
NUM_SCHEMAS = 24
BLOCK_BYTES = 32 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, dimensions, fp32


def schema_grammar(schema: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": {"whitespace_flexible": False}}}]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=CONTEXT, vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def driver(folder: Path) -> Iterator[Driver]:
    driver = Driver(tiny_engine_config(folder, max_num_batched_tokens=64))
    driver.load(folder)
    yield driver
    driver.finish()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.5, "seed": 3}, {"min_p": 0.2}])
def test_every_answer_of_a_random_model_follows_its_schema(
    driver: Driver, tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]
    for index, schema in enumerate(schemas):
        driver.add(str(index), [5, index], grammar=schema_grammar(schema), max_tokens=CONTEXT - 8, **sampling)
    driver.finish()
    assert not driver.failed
    for index, schema in enumerate(schemas):
        jsonschema.validate(json.loads(tokenizer.decode(driver.tokens(str(index)))), schema)
        assert driver.last(str(index)).finish_reason == "stop"


def test_a_preempted_answer_goes_on_where_its_grammar_was(folder: Path, tokenizer: Tokenizer) -> None:
    small = Driver(tiny_engine_config(folder, max_model_len=256, kv_cache_bytes=9 * BLOCK_BYTES))
    small.load(folder)
    schema = {"type": "array", "items": {"enum": ["one", 2, None]}, "minItems": 20, "maxItems": 24}
    for index in range(6):
        small.add(str(index), [5, index], grammar=schema_grammar(schema), max_tokens=250, temperature=1.0, seed=index)
    small.finish()
    assert sum(stats.num_preempted for stats in small.stats) > 0
    for index in range(6):
        jsonschema.validate(json.loads(tokenizer.decode(small.tokens(str(index)))), schema)


def test_a_grammar_changes_nothing_for_the_others_of_its_batch(driver: Driver) -> None:
    alone = driver.generate([7, 8, 9], max_tokens=30)
    driver.add("free", [7, 8, 9], max_tokens=30)
    driver.add("bound", [7, 8, 9], max_tokens=30, grammar="start: /[a-z]+/")
    driver.finish()
    assert driver.tokens("free") == alone
    assert set(driver.tokens("bound")).isdisjoint(alone) or driver.tokens("bound") != alone


def test_an_answer_ends_where_its_grammar_does_whatever_else_it_asks(driver: Driver, tokenizer: Tokenizer) -> None:
    ids = driver.generate([7], max_tokens=30, grammar='start: "one" | "two"', ignore_eos=True, min_tokens=20)
    assert tokenizer.decode(ids) in ("one", "two")


def test_a_grammar_that_may_end_and_go_on_ends_by_the_end_token(driver: Driver, tokenizer: Tokenizer) -> None:
    ids = driver.generate(
        [7], max_tokens=30, grammar="start: /a+/", logit_bias={EOS: 100.0}, min_tokens=4, ignore_eos=False
    )
    assert ids[-1] == EOS
    assert len(ids) >= 4
    assert set(tokenizer.decode(ids)) == {"a"}


def test_a_bad_grammar_fails_its_request_and_no_other(driver: Driver) -> None:
    driver.add("bad", [7], grammar="start: /a(/")
    driver.add("good", [7], grammar='start: "b"')
    driver.finish()
    assert [(name, failed.kind) for name, failed in driver.failed.items()] == [("bad", "invalid")]
    assert "unclosed group" in driver.failed["bad"].message
    assert driver.last("good").finish_reason == "stop"


def test_a_grammar_that_no_allowed_token_follows_fails_its_request(driver: Driver, tokenizer: Tokenizer) -> None:
    (allowed,) = tokenizer.encode("x", add_special_tokens=False)
    driver.add("bad", [7], grammar='start: "b"', allowed_token_ids=(allowed,))
    driver.add("good", [7], grammar='start: "b" | "x"', allowed_token_ids=(allowed,))
    driver.finish()
    assert "could not be made to follow its grammar" in driver.failed["bad"].message
    assert driver.tokens("good") == [allowed]


def test_an_abort_while_its_grammar_is_compiled_leaves_nothing(driver: Driver) -> None:
    driver.add("gone", [7], grammar=schema_grammar(random_schema(random.Random(0))))
    driver.abort("gone")
    driver.finish()
    assert driver.tokens("gone") == []
    assert driver.engine.num_requests == 0
