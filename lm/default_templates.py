"""The chat templates of models that bring none, one per family, as its publisher states the format. Torch-free.

- llama3: BOS, then per message `<|start_header_id|>ROLE<|end_header_id|>\\n\\nTEXT<|eot_id|>`. For tokenizers with these
  tokens: Llama 3, 3.1, 3.2, 3.3. Texts are stripped; nothing is added, Llama 3.1's dates neither.
- llama2: `<s>[INST] USER [/INST] ANSWER </s>` per turn; a system message goes into the first USER as
  `<<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\n`. For model_type llama with `<s>` and `</s>`. Texts are stripped.
- mistral: `<s>`, then `[INST] USER [/INST] ANSWER</s>` per turn; a system message and an empty line go before the first
  USER. For model_type mistral with `<s>` and `</s>`. Answers are stripped.
- qwen: ChatML, `<|im_start|>ROLE\\nTEXT<|im_end|>\\n` per message; where no system message begins the conversation, Qwen
  2's "You are a helpful assistant." does. For model_type qwen2 with ChatML's tokens.
- qwen3: the same without a system message of its own. For model_type qwen3 with ChatML's tokens.
- chatml: BOS, then ChatML, each turn ended by the token at which the model stops anyway. For all others.

All are prefix-stable, which training needs: a conversation begins with each of its own prompts, letter by letter.
Llama 2 and Mistral know only conversations in which user and assistant take turns, the user first; others are refused.
"""

from __future__ import annotations

from lm.tokenizer import Tokenizer

TAKE_TURNS = (
    "{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('user and assistant must take turns, the user first, behind at most one system message') }}"
    "{% endif %}"
)
SYSTEM_APART = (
    "{% set system = messages and messages[0]['role'] == 'system' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% if system and not turns %}{{ raise_exception('a system message needs a user message behind it') }}{% endif %}"
)
LLAMA2 = (
    SYSTEM_APART + "{% for message in turns %}" + TAKE_TURNS + "{% if message['role'] == 'user' %}"
    "{% set before = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if loop.first and system else '' %}"
    "{{ bos_token + '[INST] ' + (before + message['content']) | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}" + SYSTEM_APART + "{% for message in turns %}" + TAKE_TURNS + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' }}{% if loop.first and system %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def _chatml(end: str) -> str:
    """Turns ended by what the Jinja expression `end` says."""
    return (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + " + end + " + '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


QWEN3 = _chatml("'<|im_end|>'")
QWEN = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}" + QWEN3
)
CHATML = "{{ bos_token }}" + _chatml("(eos_token or '<|im_end|>')")

DEFAULT_TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen": QWEN,
    "qwen3": QWEN3,
    "chatml": CHATML,
}
DESCRIPTIONS = {
    "llama2": "Llama 2's format",
    "llama3": "Llama 3's format",
    "mistral": "Mistral's format",
    "qwen": "Qwen 2's ChatML",
    "qwen3": "Qwen 3's ChatML",
    "chatml": "ChatML with the model's own EOS",
}


def choose_default(model_type: str | None, tokenizer: Tokenizer | None) -> tuple[str, str]:
    """The default template for a model, and its name for people."""
    name = _family(model_type, tokenizer) if tokenizer else "chatml"
    return DEFAULT_TEMPLATES[name], f"the default one, {DESCRIPTIONS[name]}, as the model has none"


def _family(model_type: str | None, tokenizer: Tokenizer) -> str:
    chatml = tokenizer.has("<|im_start|>", "<|im_end|>")
    if tokenizer.has("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        return "llama3"
    if chatml and model_type in ("qwen2", "qwen3"):
        return "qwen3" if model_type == "qwen3" else "qwen"
    if not chatml and (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>"):
        return {"llama": "llama2", "mistral": "mistral"}.get(model_type or "", "chatml")
    return "chatml"
