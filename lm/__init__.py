"""The language model: config, transformer, tokenizer, template, checkpoints, KV cache, LoRA, devices and ops.

Knows neither training runs (`trainer`) nor HTTP (`service`).
"""
