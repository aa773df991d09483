"""Flax (NNX) language models and encoders that know nothing of quantization, and their Hugging Face checkpoints."""

from jaxq.models.bert import sentence_embedding
from jaxq.models.build import Model, cast_once, init, model_of
from jaxq.models.hf import load, save_hf

__all__ = ["Model", "cast_once", "init", "load", "model_of", "save_hf", "sentence_embedding"]
