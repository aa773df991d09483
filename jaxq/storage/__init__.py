"""Quantized models on disk: trees (`save`, `load`), and in `models` whole ones with configuration and tokenizer."""

from jaxq.storage.trees import load, save

__all__ = ["load", "save"]
