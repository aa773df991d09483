"""What a quantized model is worth: text to evaluate on, and perplexity."""

from jaxq.evaluate.perplexity import Perplexity, perplexity
from jaxq.evaluate.text import pack, read_documents, stdlib_documents

__all__ = ["Perplexity", "pack", "perplexity", "read_documents", "stdlib_documents"]
