"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and how they are stretched to longer texts.

Formulas as in transformers' modeling_rope_utils.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

# Each type, and what its settings must hold.
TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
ORIGINAL = "original_max_position_embeddings"


def read_rope(config: dict) -> dict:
    """Rotary settings from either spelling (``rope_parameters``, or ``rope_theta`` and ``rope_scaling``).

    Raises ValueError for a type other than TYPES, a missing setting, settings for each type of layer, or a partial
    rotation.
    """
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError("config.json: rope_parameters for each type of layer are not supported; one for all is")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in TYPES:
        raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(TYPES)}")
    for key in TYPES[kind]:
        if found.get(key) is None:
            raise ValueError(f"config.json: rope type {kind!r} needs {key!r}, which its settings lack")
    if found.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    context = config["max_position_embeddings"]
    return found | {
        "rope_type": kind,
        "rope_theta": found.get("rope_theta", config.get("rope_theta", 10000.0)),
        "max_position_embeddings": context,
        ORIGINAL: config.get(ORIGINAL, found.get(ORIGINAL, context)),
    }


def angles(rope: dict, dim: int, places: jax.Array, length: int) -> jax.Array:
    """The angle of each pair of channels at ``places [T]`` of a text of ``length`` tokens, float32 ``[T, dim / 2]``."""
    steps = jnp.asarray(_frequencies(rope, dim, length), jnp.float32)
    return places.astype(jnp.float32)[:, None] * steps[None]


def _frequencies(rope: dict, dim: int, length: int) -> np.ndarray:
    """Angle per position of each pair of channels, float64 ``[dim / 2]``."""
    theta, factor, pairs = rope["rope_theta"], rope.get("factor", 1.0), np.arange(0, dim, 2)
    if rope["rope_type"] == "dynamic":  # the base grows with the text's length
        context = rope["max_position_embeddings"]
        stretch = factor * max(length, context) / context - (factor - 1)
        theta = theta * stretch ** (dim / (dim - 2))
    found = theta ** (-pairs / dim)
    kept = {"linear": _none, "llama3": _fast, "yarn": _early}.get(rope["rope_type"])  # the share that is not slowed
    return found if kept is None else (1 - kept(rope, found)) * found / factor + kept(rope, found) * found


def _none(rope: dict, found: np.ndarray) -> np.ndarray:
    return np.zeros_like(found)


def _fast(rope: dict, found: np.ndarray) -> np.ndarray:
    """llama3: by how often a pair turns within the original context."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return np.clip((rope[ORIGINAL] * found / (2 * math.pi) - low) / (high - low), 0.0, 1.0)


def _early(rope: dict, found: np.ndarray) -> np.ndarray:
    """yarn (Peng et al. 2023, arXiv:2309.00071): a ramp over the pairs, between two numbers of turns."""
    dim, theta = 2 * len(found), rope["rope_theta"]

    def pair(turns: float) -> float:
        return dim * math.log(rope[ORIGINAL] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return 1 - np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)


def magnitude(rope: dict) -> float:
    """What yarn multiplies rotated queries and keys by; 1 for the other types."""
    if rope["rope_type"] != "yarn":
        return 1.0
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    return grown(scales[0]) / grown(scales[1]) if scales[0] and scales[1] else grown(1.0)


def rotate(x: jax.Array, angles: jax.Array, magnitude: float = 1.0) -> jax.Array:
    """Turn channel pairs (i, i + d/2) of ``x [B, T, H, d]`` by ``angles [T, d/2]``, and stretch them."""
    cos, sin = ((f(angles) * magnitude)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
