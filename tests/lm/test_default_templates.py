"""What models without a chat template get: the format that the publisher of their family states."""

from __future__ import annotations

from pathlib import Path

import pytest

from lm.default_templates import DEFAULT_TEMPLATES
from lm.errors import UserError
from lm.template import ChatTemplate, find_template, load_template
from lm.tokenizer import load_tokenizer
from tests.support.texts import random_contents
from tests.support.tiny_tokenizers import make_sentencepiece, make_tiktoken_file, write_json, write_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "你好?"}
ANSWER = {"role": "assistant", "content": "Hi 🙂"}
AGAIN = {"role": "user", "content": "And 1+1?"}
TWO = {"role": "assistant", "content": "2"}
FULL = [SYSTEM, USER, ANSWER, AGAIN, TWO]

FORMATS = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n你好? [/INST] Hi 🙂 </s><s>[INST] And 1+1? [/INST] 2 </s>",
        "<s>[INST] 你好? [/INST]",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\n你好? [/INST] Hi 🙂</s>[INST] And 1+1? [/INST] 2</s>",
        "<s>[INST] 你好? [/INST]",
    ),
    "llama3": (
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n你好?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHi 🙂<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd 1+1?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n2<|eot_id|>"
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n你好?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "qwen": (
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好?<|im_end|>\n"
            "<|im_start|>assistant\nHi 🙂<|im_end|>\n<|im_start|>user\nAnd 1+1?<|im_end|>\n"
            "<|im_start|>assistant\n2<|im_end|>\n"
        ),
        (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
    ),
    "qwen3": (
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n你好?<|im_end|>\n"
            "<|im_start|>assistant\nHi 🙂<|im_end|>\n<|im_start|>user\nAnd 1+1?<|im_end|>\n"
            "<|im_start|>assistant\n2<|im_end|>\n"
        ),
        "<|im_start|>user\n你好?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "chatml": (
        (
            "<s><|im_start|>system\nBe brief.</s>\n<|im_start|>user\n你好?</s>\n<|im_start|>assistant\nHi 🙂</s>\n"
            "<|im_start|>user\nAnd 1+1?</s>\n<|im_start|>assistant\n2</s>\n"
        ),
        "<s><|im_start|>user\n你好?</s>\n<|im_start|>assistant\n",
    ),
}
"""Name -> the conversation FULL, and the prompt of USER alone."""
ENDS = {"llama3": "<|eot_id|>", "qwen": "<|im_end|>", "qwen3": "<|im_end|>"}


def write_model(folder: Path, name: str) -> ChatTemplate:
    """A folder of the family `name` without a chat template."""
    model_types = {"llama2": "llama", "llama3": "llama", "qwen": "qwen2"}
    write_json(folder / "config.json", {"model_type": model_types.get(name, name)})
    if name in ("llama2", "mistral"):
        make_sentencepiece(folder / "tokenizer.model")
    elif name == "llama3":
        make_tiktoken_file(folder / "tokenizer.model")
    else:
        write_tokenizer(folder, "zephyr" if name == "chatml" else "smollm2")
        (folder / "chat_template.jinja").unlink()
    return load_template(folder, load_tokenizer(folder))


@pytest.mark.parametrize("name", DEFAULT_TEMPLATES)
def test_each_family_gets_the_format_that_its_publisher_states(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = write_model(tmp_path, name)
    conversation, prompt = FORMATS[name]
    assert template.render(FULL, add_generation_prompt=False) == conversation
    assert template.render([USER], add_generation_prompt=True) == prompt
    assert "has no chat template: messages are written with the default one, " in caplog.text
    assert find_template(tmp_path) == (DEFAULT_TEMPLATES[name], template.origin)


@pytest.mark.parametrize("name", DEFAULT_TEMPLATES)
def test_the_answers_are_trained_up_to_a_token_that_ends_an_answer(tmp_path: Path, name: str) -> None:
    template = write_model(tmp_path, name)
    ids, mask = template.encode_with_mask(FULL, train_on_input=False)
    trained = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    end = ENDS.get(name, "</s>")
    text = template.tokenizer.decode(trained, skip_special_tokens=False)
    assert "".join(text.split(" ")) == f"Hi🙂{end}2{end}"
    assert trained[-1] in template.tokenizer.eos_token_ids


@pytest.mark.parametrize("name", DEFAULT_TEMPLATES)
def test_the_prompt_that_is_served_begins_what_is_trained_token_by_token(tmp_path: Path, name: str) -> None:
    template = write_model(tmp_path, name)
    contents = random_contents(200)
    for question, answer in zip(contents, reversed(contents), strict=True):
        messages = [SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = template.encode(messages[:2], add_generation_prompt=True)
        ids, mask = template.encode_with_mask([*messages, AGAIN, TWO], train_on_input=False)
        assert ids[: len(prompt)] == prompt
        assert mask.index(True) == len(prompt)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, USER], "must take turns"),
        ([ANSWER], "must take turns"),
        ([USER, SYSTEM], "must take turns"),
        ([SYSTEM], "needs a user message behind it"),
    ],
)
def test_conversations_that_the_format_cannot_hold_are_refused(
    tmp_path: Path, name: str, messages: list[dict[str, str]], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        write_model(tmp_path, name).render(messages, add_generation_prompt=True)
