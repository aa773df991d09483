"""Qwen 2 (Yang et al. 2024, arXiv:2407.10671) and Qwen 3 (Yang et al. 2025, arXiv:2505.09388): LLaMA, where q, k and v
have biases (2), or q and k are normed head by head (3)."""

from dataclasses import replace

from flax import nnx

from jaxq.models import llama

DEFAULTS = llama.DEFAULTS | {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


def qwen2(config: dict, *, rngs: nnx.Rngs) -> llama.CausalLM:
    """ValueError as ``windows`` raises it, and as ``llama.CausalLM``."""
    config = DEFAULTS | config
    return llama.CausalLM(config, llama.Variant(windows(config), qkv_bias=True), rngs=rngs)


def qwen3(config: dict, *, rngs: nnx.Rngs) -> llama.CausalLM:
    """ValueError as ``windows`` raises it, and as ``llama.CausalLM``."""
    config = DEFAULTS | {"head_dim": 128} | config
    bias = config["attention_bias"]
    return llama.CausalLM(config, llama.Variant(windows(config), bias, bias, head_norms=True), rngs=rngs)


def windows(config: dict) -> tuple[int | None, ...]:
    """How many tokens back each layer sees: ``layer_types`` say it, or else the layers from ``max_window_layers`` on
    have a window where ``use_sliding_window`` is set.

    Raises ValueError for a type of layer that is not known, and where the list does not fit the other settings.
    """
    count, window = config["num_hidden_layers"], config["sliding_window"] if config["use_sliding_window"] else None
    first = config["max_window_layers"] if window is not None else count
    types = config.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (count - first)
    sizes = {"full_attention": None, "sliding_attention": window}
    unknown = [kind for kind in types if kind not in sizes]
    if unknown:
        raise ValueError(f"config.json: layer type {unknown[0]!r} is not supported; supported: {', '.join(sizes)}")
    if window is None and "sliding_attention" in types:
        raise ValueError("config.json: layer_types has sliding_attention, but use_sliding_window is not set")
    if len(types[:count]) < count:
        raise ValueError(f"config.json: layer_types has {len(types)} entries for {count} layers")
    return tuple(sizes[kind] for kind in types[:count])


FAMILY_2 = replace(llama.FAMILY, network=qwen2)
FAMILY_3 = replace(
    llama.FAMILY,
    network=qwen3,
    names=llama.CHECKPOINT_NAMES
    | {f"layers/{{}}/attn/{x}_norm": f"model.layers.{{}}.self_attn.{x}_norm" for x in "qk"},
)
