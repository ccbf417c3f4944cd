"""The engine: one child process that owns one device and decodes. The only part of `service` that may import torch."""
