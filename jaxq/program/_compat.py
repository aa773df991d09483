"""The one place that knows how a JAX version lays out its jaxprs (0.10 and 0.11)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
from jax.extend import core
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

INLINED = frozenset(
    [
        "jit",
        "pjit",
        "closed_call",
        "core_call",
        "remat",
        "remat2",
        "checkpoint",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
    ]
)
REMAT = frozenset({"remat", "remat2", "checkpoint"})


class ScanSplit(NamedTuple):
    """How many of a scan's operands are constants and carries; the rest are scanned over."""

    consts: int
    carry: int


def shape_of(array: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, as one of `dtype`; under a mesh, with what its type says of the mesh."""
    if not isinstance(array, jax.Array):
        return jax.ShapeDtypeStruct(array.shape, dtype)
    aval = jax.typeof(array)
    weak = getattr(aval, "weak_type", False) and aval.dtype == dtype
    mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=weak)
    manual = aval.manual_axis_type
    return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=weak, sharding=aval.sharding, manual_axis_type=manual)


def is_literal(atom: Any) -> bool:
    return isinstance(atom, Literal)


def called_jaxpr(eqn: Any) -> ClosedJaxpr:
    """The program of a call-like equation (one of `INLINED`)."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return _closed(eqn.params[key])
    raise ValueError(f"jaxq cannot read the program inside primitive {eqn.primitive.name!r} of this JAX version")


def scan_split(eqn: Any) -> ScanSplit:
    if "num_consts" in eqn.params:
        return ScanSplit(eqn.params["num_consts"], eqn.params["num_carry"])
    consts, carry, _ = eqn.params["ft_in"].unpack()
    return ScanSplit(len(consts), len(carry))


def nested_jaxprs(eqn: Any) -> list[ClosedJaxpr]:
    """Every program an equation holds in its parameters."""
    found = []
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (ClosedJaxpr, Jaxpr)):
                found.append(_closed(item))
    return found


def bind(eqn: Any, args: list[Any]) -> list[Any]:
    """Evaluates an equation as it stands, whatever it is; always returns a list."""
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def quick_jit(static_argnums: int | tuple[int, ...]) -> Callable[[Callable], Callable[[], Any]]:
    """`jax.jit` for straight pieces of program that are not called under another `jit`: on CPU, they are compiled
    without the fusion emitters, which take a third of the time and do not make such pieces any faster. From JAX 0.11 on
    XLA has no other way to compile them. Nor is code generation split over threads: several programs are compiled at
    once as it is. LLVM's first level of optimization takes a seventh less time than its last, and its loops are
    vectorized, too: they take as long, and compute the same bits.

    A decorator that gives a function of no arguments: to ask for the backend, at import, would start it.
    """

    def wrap(f: Callable) -> Callable[[], Any]:
        @cache
        def jitted() -> Any:
            has_choice = jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
            options: dict[str, bool | int] = {"xla_cpu_use_fusion_emitters": False} if has_choice else {}
            if jax.default_backend() == "cpu":
                options |= {"xla_cpu_parallel_codegen_split_count": 1, "xla_backend_optimization_level": 1}
            return jax.jit(f, static_argnums=static_argnums, compiler_options=options or None)

        return jitted

    return wrap


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())
