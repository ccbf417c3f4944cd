from __future__ import annotations

import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lm.errors import UserError
from lm.tokenizer import Tokenizer, load_tokenizer
from service.engine.grammar import MAX_COMPILED, GrammarCompiler, GrammarMatcher
from tests.support.grammars import allowed_tokens, random_answer
from tests.support.json_schemas import random_schema
from tests.support.tiny_tokenizers import (
    STYLES,
    make_sentencepiece,
    make_tiktoken_file,
    write_json,
    write_tokenizer,
)

KINDS = (*STYLES, "tiktoken", "BPE", "unigram", "without prefix space")
NUM_ROWS = 70  # of the embedding beyond the tokens
NUM_SCHEMAS = 30


def write_any_tokenizer(folder: Path, kind: str) -> None:
    folder.mkdir(exist_ok=True)
    if kind in STYLES:
        write_tokenizer(folder, kind)
    elif kind == "tiktoken":
        make_tiktoken_file(folder / "tokenizer.model")
    elif kind == "unigram":
        make_sentencepiece(folder / "tokenizer.model", "unigram")
    else:
        make_sentencepiece(folder / "tokenizer.model", add_dummy_prefix=kind == "BPE")


class Tokens:
    """A tokenizer, and grammars over it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        self.num_tokens = self.tokenizer.backend.last_id + 1
        self.vocab_size = self.num_tokens + NUM_ROWS
        self.compiler = GrammarCompiler(folder, self.vocab_size)

    def matcher(self, grammar: str) -> GrammarMatcher:
        matcher = self.compiler.compile(grammar).result(60)
        assert isinstance(matcher, GrammarMatcher)
        return matcher

    def allowed(self, matcher: GrammarMatcher) -> list[int]:
        return allowed_tokens(matcher, self.vocab_size)

    def accept(self, matcher: GrammarMatcher, text: str) -> bool:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return all(token_id in self.allowed(matcher) and matcher.accept(token_id) for token_id in ids)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokens]:
    made: dict[str, Tokens] = {}

    def make(kind: str) -> Tokens:
        if kind not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            write_any_tokenizer(folder, kind)
            made[kind] = Tokens(folder)
        return made[kind]

    return make


def schema_grammar(schema: Any, **style: Any) -> str:
    style = style or {"whitespace_flexible": False}
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": style}}]})


@pytest.mark.parametrize("kind", KINDS)
def test_any_answer_under_a_schema_is_valid_in_the_tokens_of_every_kind_of_tokenizer(
    tokens: Callable[[str], Tokens], kind: str
) -> None:
    model = tokens(kind)
    rng = random.Random(kind)
    for _ in range(NUM_SCHEMAS):
        schema = random_schema(rng)
        ids = random_answer(model.matcher(schema_grammar(schema)), model.vocab_size, rng)
        jsonschema.validate(json.loads(model.tokenizer.decode(ids)), schema)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_but_text_is_allowed_within_json_and_every_end_is_behind_it(
    tokens: Callable[[str], Tokens], kind: str
) -> None:
    model = tokens(kind)
    rng = random.Random(0)
    ends = set(model.tokenizer.eos_token_ids)
    matcher = model.matcher(schema_grammar({"type": "object"}))
    seen = ""
    for _ in range(60):
        allowed = set(model.allowed(matcher))
        is_whole = is_json(seen)
        assert ends <= allowed if is_whole else not ends & allowed
        shown = {index: model.tokenizer.decode([index]) for index in allowed - ends}
        assert all(index < model.num_tokens for index in shown)
        assert all(model.tokenizer.decode([index], skip_special_tokens=False) == text for index, text in shown.items())
        if is_whole:
            break
        token_id = rng.choice(sorted(allowed))
        assert matcher.accept(token_id)
        seen += shown[token_id]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_that_spells_a_special_token_is_written_as_text(tokens: Callable[[str], Tokens], kind: str) -> None:
    model = tokens(kind)
    end = model.tokenizer.decode(model.tokenizer.eos_token_ids[:1], skip_special_tokens=False)
    ids = random_answer(model.matcher(schema_grammar({"const": f"a{end}b"})), model.vocab_size, random.Random(0))
    assert json.loads(model.tokenizer.decode(ids)) == f"a{end}b"
    assert not set(ids) & set(model.tokenizer.eos_token_ids)


def test_a_grammar_may_end_and_go_on_or_be_over(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("smollm2")
    (end,) = model.tokenizer.eos_token_ids
    matcher = model.matcher("start: /ab?c?/")
    assert model.accept(matcher, "a")
    assert end in model.allowed(matcher)
    assert not matcher.is_over
    assert model.accept(matcher, "bc")
    assert matcher.is_over
    assert model.allowed(matcher) == [end]


def test_the_end_token_ends_what_may_end(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("smollm2")
    (end,) = model.tokenizer.eos_token_ids
    matcher = model.matcher("start: /a+/")
    assert model.accept(matcher, "aa")
    assert matcher.accept(end)
    assert matcher.is_over
    assert matcher.failure is None


def test_a_token_that_is_not_allowed_is_refused_for_ever(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("smollm2")
    matcher = model.matcher('start: "yes" | "no"')
    (wrong,) = model.tokenizer.encode("x", add_special_tokens=False)
    (right,) = model.tokenizer.encode("y", add_special_tokens=False)
    assert not matcher.accept(wrong)
    assert not matcher.accept(right)
    assert "grammar" in str(matcher.failure)


def test_a_special_token_that_the_grammar_names_is_allowed(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("llama3")
    header = model.tokenizer.encode("<|start_header_id|>", add_special_tokens=False)[0]
    matcher = model.matcher(f'start: "a" <[{header}]> "b"')
    assert model.accept(matcher, "a")
    assert model.allowed(matcher) == [header]
    assert matcher.accept(header)


COMPLEX = 'start: "a" ("b" | many)\nmany: ' + " | ".join(f"r{i}" for i in range(2100)) + "\n"
COMPLEX += "\n".join(f'r{i}: "c" "{i}"' for i in range(2100))


def test_a_grammar_that_grows_too_complex_ends_its_answer_with_a_reason_and_no_other(
    tokens: Callable[[str], Tokens],
) -> None:
    model = tokens("smollm2")
    (end,) = model.tokenizer.eos_token_ids
    matcher = model.matcher(COMPLEX)
    (first,) = model.tokenizer.encode("a", add_special_tokens=False)
    refused = not matcher.accept(first) or (model.allowed(matcher) == [end] and not matcher.accept(end))
    assert refused
    assert "items" in str(matcher.failure)
    assert model.matcher(COMPLEX).failure is None


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: /a(b/", "unclosed group"),
        ("start: /(a)\\1/", "backreferences are not supported"),
        ("start: <|nope|>", "unknown special token"),
        ("start: start", "no text follows it"),
        ("a: 'x'", "lexer error"),
        (schema_grammar({"type": "string", "minLength": 5, "maxLength": 2}), "minLength (5) is greater than maxLength"),
        (schema_grammar({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema_grammar({"$ref": "#"}), "no text follows it"),
        ("", "Empty grammar"),
    ],
)
def test_what_is_no_grammar_is_a_mistake_of_the_user(
    tokens: Callable[[str], Tokens], grammar: str, reason: str
) -> None:
    future = tokens("smollm2").compiler.compile(grammar)
    with pytest.raises(UserError) as caught:
        future.result(60)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_tokens_cannot_spell_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    make_sentencepiece(tmp_path / "tokenizer.model", "unigram", byte_fallback=False)
    with pytest.raises(UserError, match="tokenizer cannot write"):
        Tokens(tmp_path).matcher('start: "☃☃"')


def test_a_model_without_an_end_has_no_grammars(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    with pytest.raises(UserError, match="no token that ends an answer"):
        Tokens(tmp_path).matcher('start: "a"')


def test_answers_under_one_grammar_do_not_disturb_each_other_in_threads(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("llama3")
    grammars = [schema_grammar(random_schema(random.Random(seed))) for seed in range(3)] * 8

    def answer(index: int) -> list[int]:
        return random_answer(matchers[index], model.vocab_size, random.Random(index))

    matchers = [model.matcher(grammar) for grammar in grammars]
    alone = list(map(answer, range(len(grammars))))
    matchers = [model.matcher(grammar) for grammar in grammars]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(answer, range(len(grammars)))) == alone


def test_only_some_grammars_are_kept(tokens: Callable[[str], Tokens]) -> None:
    model = tokens("smollm2")
    for index in range(MAX_COMPILED + 5):
        model.matcher(f'start: "{index}"')
    assert len(model.compiler._compiled) == MAX_COMPILED
    assert model.accept(model.matcher('start: "0"'), "0")
