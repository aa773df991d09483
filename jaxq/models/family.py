"""What a file of this folder says of the architectures in it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flax import nnx


@dataclass(frozen=True)
class Family:
    """Models of one ``model_type``, and how a Hugging Face checkpoint names their parameters.

    ``network(config, rngs=rngs)`` makes the module, called with ``(tokens, mask, ...)`` or with pixels; ValueError for
    what it does not support. ``names`` maps a parameter or its module to its name in a checkpoint ({} stands for the
    layer's number), ``full_name`` a tensor's name as found to the one that ``names`` gives, for prefixes come and go.
    Tensors that end in one of ``ignored`` may be there without a place in the model. ``causal``: a position sees only
    what is before it. ``pixels(config)``: height, width and channels of the images that are read; None for text.
    """

    network: Callable[..., nnx.Module]
    names: Mapping[str, str]
    full_name: Callable[[str], str]
    ignored: tuple[str, ...]
    causal: bool
    pixels: Callable[[dict], tuple[int, int, int]] | None = None


def with_prefix(prefix: str, tensor: str) -> str:
    """The name of a decoder's tensor with the prefix (``model.decoder.``) that a bare decoder's checkpoint lacks, in
    whole or in part. A head has none."""
    optional = "".join(f"({re.escape(part)}\\.)?" for part in prefix.rstrip(".").split("."))
    return tensor if tensor.startswith("lm_head.") else prefix + re.sub(f"^{optional}", "", tensor)
