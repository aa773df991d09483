"""What a quantized model is worth: text and images to evaluate on, perplexity, similarity of sentences, accuracy."""

from jaxq.evaluate.accuracy import Accuracy, accuracy
from jaxq.evaluate.classify import Labelled, classify, read_labelled
from jaxq.evaluate.images import classify_images, preprocess, read_images
from jaxq.evaluate.perplexity import Perplexity, perplexity
from jaxq.evaluate.sts import Similarity, embed, read_sts, sts
from jaxq.evaluate.text import pack, pad, pad_columns, read_documents, stdlib_documents

__all__ = [
    "Accuracy",
    "Labelled",
    "Perplexity",
    "Similarity",
    "accuracy",
    "classify",
    "classify_images",
    "embed",
    "pack",
    "pad",
    "pad_columns",
    "perplexity",
    "preprocess",
    "read_documents",
    "read_images",
    "read_labelled",
    "read_sts",
    "stdlib_documents",
    "sts",
]
