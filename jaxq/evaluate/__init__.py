"""What a quantized model is worth: text to evaluate on, perplexity, similarity of sentences."""

from jaxq.evaluate.perplexity import Perplexity, perplexity
from jaxq.evaluate.sts import Similarity, embed, read_sts, sts
from jaxq.evaluate.text import pack, pad, read_documents, stdlib_documents

__all__ = [
    "Perplexity",
    "Similarity",
    "embed",
    "pack",
    "pad",
    "perplexity",
    "read_documents",
    "read_sts",
    "stdlib_documents",
    "sts",
]
