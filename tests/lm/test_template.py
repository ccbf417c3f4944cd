"""Chat templates beside transformers' apply_chat_template, and which tokens of a conversation are trained."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lm.errors import UserError
from lm.jinja_template import MAX_RENDERED_CHARS
from lm.template import ChatTemplate, load_template
from lm.tokenizer import load_tokenizer
from tests.support.texts import random_contents
from tests.support.tiny_tokenizers import STYLES, write_json, write_tokenizer

SYSTEM = {"role": "system", "content": "Answer in one line."}
USER = {"role": "user", "content": "你是谁?\n<|im_end|> </s>"}
ANSWER = {"role": "assistant", "content": "I am 🤖.\n\n  def f(x): return x"}
THANKS = {"role": "user", "content": "Thanks!"}
WELCOME = {"role": "assistant", "content": "不客气"}
CONVERSATIONS = (
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER],
    [SYSTEM, USER, ANSWER, THANKS],
    [USER, ANSWER, THANKS, WELCOME],
    [SYSTEM, USER, ANSWER, THANKS, WELCOME],
)
STRANGE_SYNTAX = """
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
    {% generation %}
[{{ ns.count }}] {{ message | tojson }} {{ message | tojson(indent=2) }} {{ eos_token }}{{ pad_token }}
    {% endgeneration %}
    {% if ns.count > 2 %}{% break %}{% endif %}
{% endfor %}
{% if tools is not none or documents is not none %}never{% endif %}
{% macro date() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}
{{ date() }}{% if add_generation_prompt %} > {% endif %}
"""


def template_of(folder: Path, style: str = "smollm2", source: str | None = None) -> ChatTemplate:
    write_tokenizer(folder, style)
    if source is not None:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_template(folder, load_tokenizer(folder))


def trained_text(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    ids, mask = template.encode_with_mask(messages, train_on_input=False)
    trained = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    return template.tokenizer.decode(trained, skip_special_tokens=False)


def ids_of_transformers(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"])


# ---- rendering


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("style", STYLES)
def test_text_and_ids_equal_those_of_transformers(tmp_path: Path, style: str, add_generation_prompt: bool) -> None:
    ours, theirs = template_of(tmp_path, style), AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
        assert ours.render(messages, **options) == theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.encode(messages, **options) == ids_of_transformers(theirs, messages, **options)


def test_every_extension_that_transformers_gives_templates_works(tmp_path: Path) -> None:
    ours, theirs = template_of(tmp_path, source=STRANGE_SYNTAX), AutoTokenizer.from_pretrained(tmp_path)
    messages = [SYSTEM, USER, ANSWER, {"role": "user", "content": "<b>'\"&\u2028"}, WELCOME]
    rendered = ours.render(messages, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "你是谁" in rendered
    assert rendered.endswith(" > ")


def test_a_template_in_tokenizer_config_is_used_where_there_is_no_file_of_its_own(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm2")
    file = tmp_path / "chat_template.jinja"
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "config {{ messages }}"}
    write_json(tmp_path / "tokenizer_config.json", settings)
    assert load_template(tmp_path, load_tokenizer(tmp_path)).origin == "chat_template.jinja"
    file.unlink()
    template = load_template(tmp_path, load_tokenizer(tmp_path))
    assert template.origin == "tokenizer_config.json"
    assert template.render([THANKS], add_generation_prompt=False).startswith("config ")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    write_json(tmp_path / "tokenizer_config.json", settings | {"chat_template": named})
    assert load_template(tmp_path, load_tokenizer(tmp_path)).render([THANKS], add_generation_prompt=False) == (
        AutoTokenizer.from_pretrained(tmp_path).apply_chat_template([THANKS], tokenize=False)
    )
    write_json(tmp_path / "tokenizer_config.json", settings | {"chat_template": named[:1]})
    with pytest.raises(UserError, match=r"none is named default \(found \['tool_use'\]\)"):
        load_template(tmp_path, load_tokenizer(tmp_path))


# ---- refusals


@pytest.mark.parametrize(
    ("messages", "param", "reason"),
    [
        ([], "messages", r"at least one message \(got \[\]\)"),
        ("hello", "messages", r"must be a list of at least one message \(got 'hello'\)"),
        ([USER, "hello"], "messages[1]", r"messages\[1\]: must be an object"),
        ([USER, {"content": "x"}], "messages[1].role", r"messages\[1\]\.role: must be a string \(it is missing\)"),
        ([{"role": "robot", "content": "x"}], "messages[0].role", r"one of system, user, assistant.* \(got 'robot'\)"),
        ([{"role": "user", "content": None}], "messages[0].content", r"must be a string \(got None\)"),
        ([{"role": "user"}], "messages[0].content", r"messages\[0\]\.content: must be a string \(it is missing\)"),
        ([USER | {"weight": 1}], "messages[0]", r"messages\[0\]\.weight: unknown field"),
    ],
)
def test_malformed_messages_are_refused_with_their_place(
    tmp_path: Path, messages: Any, param: str, reason: str
) -> None:
    template = template_of(tmp_path)
    with pytest.raises(UserError, match=reason) as caught:
        template.render(messages, add_generation_prompt=True)
    assert caught.value.param == param
    with pytest.raises(UserError, match=reason):
        template.encode_with_mask(messages, train_on_input=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses them: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses them: can only concatenate str"),
        ("{{ messages[9].content }}", "refuses them: .* has no element 9"),
        ("{{ 1 / 0 }}", "refuses them: division by zero"),
        ("{{ messages.__class__.__mro__ }}", "refuses them: access to attribute '__class__'"),
        ("{{ strftime_now.__self__.x }}", "refuses them: access to attribute '__self__'"),
        ("{{ messages.append(1) }}", "refuses them: access to attribute 'append'"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}spam and eggs{% endfor %}{% endfor %}", "makes over"),
        ("{% for i in range(1000000) %}{% endfor %}", "refuses them: Range too big"),
    ],
)
def test_what_goes_wrong_in_a_template_is_an_error_of_the_messages(tmp_path: Path, source: str, reason: str) -> None:
    template = template_of(tmp_path, source=source)
    with pytest.raises(UserError, match=reason) as caught:
        template.render([USER], add_generation_prompt=True)
    assert caught.value.param == "messages"


def test_a_template_that_is_not_valid_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(chat_template\.jinja\) is not valid Jinja: line 2: Expected an expr"):
        template_of(tmp_path, source="{% for message in messages %}\n{% if %}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not UTF-8"):
        load_template(tmp_path, load_tokenizer(tmp_path))


def test_the_longest_conversation_still_renders(tmp_path: Path) -> None:
    template = template_of(tmp_path, source="{{ messages[0].content }}")
    longest = {"role": "user", "content": "x" * MAX_RENDERED_CHARS}
    assert len(template.render([longest], add_generation_prompt=False)) == MAX_RENDERED_CHARS
    with pytest.raises(UserError, match="makes over 16777216 characters of them"):
        template.render([{"role": "user", "content": longest["content"] + "x"}], add_generation_prompt=False)


# ---- trained tokens


@pytest.mark.parametrize(("style", "end"), [("smollm2", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("zephyr", "</s>")])
def test_each_answer_is_trained_with_the_token_that_ends_it_and_nothing_else(
    tmp_path: Path, style: str, end: str
) -> None:
    template = template_of(tmp_path, style)
    answer, welcome = ANSWER["content"], WELCOME["content"]
    assert trained_text(template, [SYSTEM, USER, ANSWER]) == answer + end
    assert trained_text(template, [USER, ANSWER, THANKS, WELCOME]) == answer + end + welcome + end
    assert trained_text(template, [USER, ANSWER, THANKS]) == answer + end
    quoting = {"role": "assistant", "content": f"It ends with {end}"}
    assert trained_text(template, [USER, quoting, THANKS]) == quoting["content"] + end


@pytest.mark.parametrize("style", STYLES)
def test_the_prompt_that_is_served_is_a_prefix_of_what_is_trained_token_by_token(tmp_path: Path, style: str) -> None:
    template, theirs = template_of(tmp_path, style), AutoTokenizer.from_pretrained(tmp_path)
    contents = random_contents(300)
    for question, answer in zip(contents, reversed(contents), strict=True):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, mask = template.encode_with_mask(messages, train_on_input=False)
        prompt = template.encode(messages[:1], add_generation_prompt=True)
        assert ids == ids_of_transformers(theirs, messages)
        assert ids[: len(prompt)] == prompt
        assert mask.index(True) == len(prompt)
        stop = len(ids) - mask[::-1].index(True)
        assert mask[len(prompt) : stop] == [True] * (stop - len(prompt))
        assert ids[stop - 1] in template.tokenizer.eos_token_ids


def test_train_on_input_trains_every_token_and_needs_no_answer(tmp_path: Path) -> None:
    template = template_of(tmp_path)
    for messages in ([USER], [SYSTEM, USER, ANSWER]):
        ids, mask = template.encode_with_mask(messages, train_on_input=True)
        assert ids == template.encode(messages, add_generation_prompt=False)
        assert mask == [True] * len(ids)


def test_a_conversation_without_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no assistant message, so there is nothing to train on"):
        template_of(tmp_path).encode_with_mask([SYSTEM, USER], train_on_input=False)


def test_a_token_that_reaches_over_the_edge_of_the_answer_belongs_to_it(tmp_path: Path) -> None:
    template = template_of(tmp_path, source="{% for message in messages %}{{ message.content }}{% endfor %}")
    messages = [{"role": "user", "content": "The qui"}, {"role": "assistant", "content": "ck brown 鑫"}]
    ids, mask = template.encode_with_mask(messages, train_on_input=False)
    assert [template.tokenizer.decode([token]) for token in ids[:3]] == ["The", " quick", " brown"]
    assert mask == [False] + [True] * (len(ids) - 1)


WITHOUT_OLD_REASONING = (
    "{% for m in messages %}[{{ m.role }}]"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SYSTEM_BEFORE_LAST_QUESTION = (
    "{% for m in messages[1:] %}{% if loop.index0 == (messages[1:] | length - 1) // 2 * 2 %}"
    "{{ messages[0].content }}{% endif %}[{{ m.content }}]{% endfor %}"
)
OTHER_GENERATION_PROMPT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
)
REASONED = {"role": "assistant", "content": "<think>hm</think>yes"}


@pytest.mark.parametrize(
    ("source", "messages", "index"),
    [
        (WITHOUT_OLD_REASONING, [USER, REASONED, THANKS, WELCOME], 1),
        (SYSTEM_BEFORE_LAST_QUESTION, [SYSTEM, USER, ANSWER, THANKS, WELCOME], 2),
        (OTHER_GENERATION_PROMPT, [USER, ANSWER], 1),
    ],
)
def test_a_template_that_is_not_prefix_stable_is_refused_with_the_reason(
    tmp_path: Path, source: str, messages: list[dict[str, str]], index: int
) -> None:
    template = template_of(tmp_path, source=source)
    with pytest.raises(UserError, match=r"is not prefix-stable: .* they part after '") as caught:
        template.encode_with_mask(messages, train_on_input=False)
    assert caught.value.param == f"messages[{index}]"
    template.encode_with_mask(messages, train_on_input=True)


def test_a_date_in_the_template_is_read_once_for_a_conversation(tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ strftime_now('%H:%M:%S.%f') }}{{ m.content }}<|im_end|>{% endfor %}"
    template = template_of(tmp_path, source=source + "{{ strftime_now('%H:%M:%S.%f') if add_generation_prompt }}")
    assert trained_text(template, [THANKS, WELCOME]) == "不客气<|im_end|>"
    assert str(datetime.now().year) == template_of(tmp_path, source="{{ strftime_now('%Y') }}").render(
        [THANKS], add_generation_prompt=False
    )
