"""Mistral (Jiang et al. 2023, arXiv:2310.06825): LLaMA without biases whose layers see a window of tokens."""

from dataclasses import replace

from flax import nnx

from jaxq.models import llama

DEFAULTS = llama.DEFAULTS | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def mistral(config: dict, *, rngs: nnx.Rngs) -> llama.CausalLM:
    """``sliding_window`` null: every layer sees all tokens before."""
    config = DEFAULTS | config
    windows = (config["sliding_window"],) * config["num_hidden_layers"]
    return llama.CausalLM(config, llama.Variant(windows), rngs=rngs)


FAMILY = replace(llama.FAMILY, network=mistral)
