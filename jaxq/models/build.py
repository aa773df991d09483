"""From a configuration to a pure forward function and the layout of its parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
from flax import nnx

from jaxq.arrays import widened
from jaxq.models import bert, bloom, llama, mistral, opt, qwen, vit
from jaxq.models.checkpoint import release
from jaxq.models.family import Family

Params = dict[Any, Any]
Forward = Callable[..., jax.Array]
Step = Callable[..., tuple[jax.Array, tuple]]

FAMILIES: Mapping[str, Family] = {
    "opt": opt.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen.FAMILY_2,
    "qwen3": qwen.FAMILY_3,
    "bloom": bloom.FAMILY,
    "bert": bert.FAMILY,
    "vit": vit.FAMILY,
    "deit": vit.FAMILY_DEIT,
}
SIZES = (
    *("hidden_size", "intermediate_size", "ffn_dim", "word_embed_proj_dim", "head_dim", "vocab_size"),
    *("num_hidden_layers", "n_layer", "num_attention_heads", "num_key_value_heads", "n_head"),
    *("max_position_embeddings", "num_channels"),
)


@dataclass(frozen=True)
class Functions:
    """What a configuration describes, without numbers: ``layout`` are the parameters as abstract float32 arrays, the
    rest as in ``Model``."""

    family: str
    forward: Forward
    step: Step
    kept: tuple[tuple[int, int], ...]
    layout: Params


@dataclass(frozen=True)
class Model:
    """A language model, encoder or classifier of images as jaxq sees one: a pure function and the parameters it takes.

    ``forward(params, tokens, mask=None)``: ``tokens`` int32 ``[B, T]``, ``mask`` bool or int ``[B, T]`` (1 = a real
    token) -> logits ``[B, T, V]``; it computes in the parameters' type, or ``computes_in``. BERT takes token types
    ``[B, T]`` after the mask, and gives what its architecture does: hidden states ``[B, T, D]``, logits ``[B, T, V]``
    or ``[B, labels]``.
    ViT's is ``forward(params, pixels)``: float ``[B, H, W, C]`` -> logits ``[B, labels]``.
    ``step(params, tokens, caches, position)`` is the same function for a text read piece by piece, see
    ``decoder.Decoder.step``; ``kept`` are the heads and channels of what each layer's cache holds, none in an encoder.
    ``params`` is a nested dict with Flax's layout (``layers/0/attn/q/kernel``; kernels ``[in, out]``). ``config`` is
    the content of ``config.json``, ``tokenizer`` a transformers tokenizer or what acts as one
    (``tokenizer.TextTokenizer``), ``preprocessor`` the content of ``preprocessor_config.json``, or None where there is
    none. ``computes_in``: the type that half-precision parameters are cast to first; None: they are not.
    """

    name: str
    family: str
    config: dict[str, Any]
    forward: Forward
    step: Step
    kept: tuple[tuple[int, int], ...]
    params: Params
    tokenizer: Any
    preprocessor: dict[str, Any] | None = None
    computes_in: Literal["float32"] | None = None

    @property
    def causal(self) -> bool:
        """Whether this is a language model that reads from left to right; if not, an encoder."""
        return FAMILIES[self.family].causal

    @property
    def pixels(self) -> tuple[int, int, int] | None:
        """Height, width and channels of the images that this model reads; None where it reads text."""
        shape = FAMILIES[self.family].pixels
        return None if shape is None else shape(self.config)


def model_of(
    config: Mapping[str, Any],
    params: Params,
    tokenizer: Any = None,
    name: str = "model",
    preprocessor: dict[str, Any] | None = None,
) -> Model:
    """A Model from a configuration (the content of a ``config.json``) and parameters made elsewhere.

    Raises ValueError if the configuration asks for something that is not supported.
    """
    made = build(config, name)
    return Model(name, made.family, dict(config), made.forward, made.step, made.kept, params, tokenizer, preprocessor)


def in_float32(model: Model) -> Model:
    """The model that computes in float32 what parameters in half precision say; of no others it is another."""

    def casting(function: Callable) -> Callable:
        return lambda params, *inputs: function(widened(params), *inputs)

    return replace(model, forward=casting(model.forward), step=casting(model.step), computes_in="float32")


def cast_once(model: Model, params: Params) -> Params:
    """Parameters as ``forward`` and ``step`` cast them at every call, for there are to be many: leaf by leaf, so that
    a mapped file need not stay in memory beside them."""

    def converted(leaf: Any) -> Any:
        found = jax.block_until_ready(widened(leaf))
        if found is not leaf:
            release(leaf)
        return found

    return params if model.computes_in is None else jax.tree.map(converted, params)


def init(config: Mapping[str, Any], seed: int = 0) -> Params:
    """Fresh float32 parameters for a configuration, drawn by Flax's initialisers; ValueError as for ``model_of``."""
    module = _module(config, "config")
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(module(nnx.Rngs(seed)))))()  # one compilation, not one a leaf


def build(config: Mapping[str, Any], source: str) -> Functions:
    """The functions that a configuration describes and the layout of their parameters; allocates nothing.

    ``source`` names the configuration in errors. Raises ValueError for an unsupported or incomplete configuration.
    """
    module = _module(config, source)
    try:
        network = nnx.eval_shape(lambda: module(cast(nnx.Rngs, _OneKey())))
    except KeyError as error:
        raise ValueError(f"{source}: the configuration has no {error}") from error
    graph, state = nnx.split(network)
    layout, family = nnx.to_pure_dict(state), config["model_type"]

    def forward(params: Params, *inputs: jax.Array) -> jax.Array:
        _check_structure(params, layout)
        return nnx.merge(graph, params)(*inputs)

    def step(params: Params, tokens: jax.Array, caches: Any, position: jax.Array) -> tuple[jax.Array, tuple]:
        _check_structure(params, layout)
        if not FAMILIES[family].causal:
            raise ValueError(f"{source}: {family} is an encoder, which does not go on with a text")
        decoder: Any = nnx.merge(graph, params)
        return decoder.step(tokens, caches, position)

    return Functions(family, forward, step, getattr(network, "kept", ()), layout)


class _OneKey:
    """In place of `nnx.Rngs`, whose counters take time that grows with the square of the layers under tracing."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def flat(params: Params) -> dict[str, Any]:
    """Parameters by path, ``{"layers/0/attn/q/kernel": leaf, ...}``; whatever is not a dict counts as a leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: not isinstance(node, dict))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _module(config: Mapping[str, Any], source: str) -> Callable[[nnx.Rngs], nnx.Module]:
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ValueError(
            f"{source}: model_type {config.get('model_type')!r} is not supported; supported: {', '.join(FAMILIES)}. "
            "Any other model can be quantized as a function of its parameters: see docs/own_model.md"
        )
    _check_sizes(config, source)
    return lambda rngs: family.network(dict(config), rngs=rngs)


def _check_sizes(config: Mapping[str, Any], source: str) -> None:
    for key in SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{source}: {key} is {value!r}; it must be a positive integer")
    width, heads = config.get("hidden_size"), config.get("num_attention_heads") or config.get("n_head")
    if width and heads and not config.get("head_dim") and width % heads:
        raise ValueError(f"{source}: hidden_size {width} does not divide into {heads} attention heads")


def _check_structure(params: Params, layout: Params) -> None:
    found, expected = flat(params).keys(), flat(layout).keys()
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise ValueError(f"params do not fit the model: missing {missing[:4]}, unexpected {extra[:4]}")
