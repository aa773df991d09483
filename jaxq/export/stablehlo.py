"""StableHLO: a quantized forward function as one file, which needs neither jaxq nor the model's code to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.export

from jaxq.execute import execute
from jaxq.qtensor import Quantized

PLATFORMS = ("cpu", "tpu", "cuda")


def stablehlo(
    forward: Callable, quantized: Quantized, *inputs: Any, platforms: Sequence[str] = PLATFORMS
) -> tuple[bytes, dict[str, jax.Array]]:
    """`execute(forward, "xla")` lowered to StableHLO, and what it reads:

        data, arrays = stablehlo(forward, quantized, tokens)
        jax.export.deserialize(data).call(arrays, tokens)

    The second line needs JAX alone: `arrays` is a plain dict, to be stored in any way that keeps names and dtypes
    (safetensors, `numpy.savez`). Which versions of JAX read `data` is for jax.export's compatibility guarantees to say.

    Args:
      forward: as for `calibrate`.
      quantized: what `calibrate` made of its parameters, packed or not.
      inputs: arrays or `jax.ShapeDtypeStruct`s: the file serves these shapes.
      platforms: what the file is for, in one.

    Returns:
      the serialized function, and its first argument: the codes, scales and other parameters by their path
      (`.params['layers'][0]['up']['kernel'].codes`).

    Raises:
      ModuleNotFoundError: `flatbuffers` is not installed; jax.export writes with it.
    """
    plain = replace(quantized, transforms={})  # they are in the parameters already
    found, structure = jax.tree_util.tree_flatten_with_path(plain)
    parameters = {jax.tree_util.keystr(keys): leaf for keys, leaf in found}

    def run(arrays: dict[str, jax.Array], *inputs: Any) -> Any:
        return execute(forward, "xla")(jax.tree.unflatten(structure, [arrays[name] for name in parameters]), *inputs)

    exported = jax.export.export(jax.jit(run), platforms=tuple(platforms))(parameters, *inputs)
    return bytes(exported.serialize()), parameters
