"""`execute`: the function transform that runs a forward function on a quantized parameter tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple, get_args

import jax
from jax import lax
from jax.core import Tracer

from jaxq.contraction import apply_input
from jaxq.kernels.plain import Products
from jaxq.pack import check_packed
from jaxq.products import look_up, looks_up, multiplies, multiply, read_input
from jaxq.program import _compat
from jaxq.program.graph import Node
from jaxq.program.groups import GroupPlan, Layout, skipped_in
from jaxq.program.sites import Site
from jaxq.program.trace import Program, abstract, named_leaves, trace
from jaxq.qtensor import InputQuant, Packed, Quantized, is_qtensor, logical

Address = tuple[int, ...]
Key = tuple[str, int]  # a packed leaf's path, and how many scans around it slice it


class Held(NamedTuple):
    """What the program's contractions need besides their operands; in a scan's body, of one layer."""

    inputs: dict[str, InputQuant]
    packed: dict[Key, Packed]


@dataclass
class Plan:
    """Where, in one jaxpr, something has to be done: contractions and look-ups by address, loops with such inside."""

    products: Products
    contractions: dict[Address, list[GroupPlan]] = field(default_factory=dict)
    loops: dict[Address, tuple[Node, list[Plan]]] = field(default_factory=dict)

    @property
    def groups(self) -> list[GroupPlan]:
        own = [group for groups in self.contractions.values() for group in groups]
        return own + [group for _, plans in self.loops.values() for plan in plans for group in plan.groups]

    def inside(self, at: Address) -> bool:
        """Whether the call at this address contains anything to do."""
        return any(a[: len(at)] == at for a in (*self.contractions, *self.loops) if len(a) > len(at))


def execute(forward: Callable, products: Products = "int8") -> Callable:
    """The same function, run in low precision where its parameters say so.

    Args:
      forward: `forward(params, *inputs) -> outputs`, any traceable function over any pytree of arrays.
      products: how packed weights are multiplied, see `jaxq.kernels.plain`; the results are the same up to the order of
        accumulation. "int8": by kernels where the device has them (`jaxq.kernels.tpu`, `jaxq.kernels.gpu`),
        in 8-bit products where the numbers fit, else as "float".
        Integers hold no NaN: with a static grid one in an activation counts as 0, where unpacked weights give NaN.
        "xla": as "int8", but without kernels: for programs that other devices than this one run.
        "float": products in float32, on accelerators in bfloat16.
        "decoded": packed weights are only decoded, and activations fake-quantized, as without `pack`.

    Returns:
      A function of the same signature that also takes what `calibrate` returns in place of `params`. Quantized
      weights stand for the arrays they encode, and the inputs of each group are shifted, scaled and fake-quantized
      just before its contractions. Of what `pack` returns, integers are multiplied. With a plain tree it computes what
      `forward` computes, bit for bit. It can be transformed by `jit`, `grad` (straight-through), `vmap` and
      `jax.export`.

    Raises:
      ValueError: `products` is none of these; or, when it is called, a packed leaf is damaged, with the path.
    """
    if products not in get_args(Products):
        raise ValueError(f"execute: products is {products!r}; possible are {', '.join(get_args(Products))}")
    programs: dict[Any, Program] = {}

    @wraps(forward)
    def run(params: Any, *inputs: Any) -> Any:
        quantized = params if isinstance(params, Quantized) else Quantized(params)
        packed = {path: leaf for path, leaf in named_leaves(quantized.params) if isinstance(leaf, Packed)}
        for path, leaf in packed.items():
            check_packed(path, leaf)
        program = _cached(programs, forward, quantized.params, inputs)
        leaves = jax.tree.leaves(logical(quantized.params)) + jax.tree.leaves(inputs)
        packed = {} if products == "decoded" else packed
        plan = make_plan(program.layout, quantized.inputs, packed, products)
        _check_left_out(program.layout, quantized.inputs)
        held = Held(quantized.inputs, {key: packed[key[0]] for key in _keys(plan) if _has(packed, key)})
        outs = interpret(program.closed, leaves, plan, held)
        return jax.tree.unflatten(program.out_tree, outs)

    return run


def _check_left_out(layout: Layout, inputs: dict[str, InputQuant]) -> None:
    """A weight whose input is quantized must not go unquantized here only because it is read in another way."""
    parts = layout.all()
    found = {site for part in parts for group in part.groups for site in group.sites}
    wanted = {site for quant in inputs.values() for site in quant.sites} - found
    for row in skipped_in(layout) if wanted else []:
        if lost := wanted.intersection(row.path.split(", ")):
            raise ValueError(
                f"{min(lost)}: its input was calibrated to be quantized, but in this function {row.reason}"
            )


def _cached(programs: dict, forward: Callable, params: Any, inputs: tuple) -> Program:
    """Eager calls trace once for each set of shapes; under a transformation the trace may hold its tracers."""
    leaves, tree = jax.tree.flatten((params, inputs), is_leaf=is_qtensor)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((params, inputs))):
        return trace(forward, params, *inputs)
    key = (tree, tuple((s.shape, s.dtype, s.weak_type) for s in map(abstract, leaves)))
    if key not in programs:
        programs[key] = trace(forward, params, *inputs)
    return programs[key]


def make_plan(layout: Layout, inputs: dict[str, InputQuant], packed: dict[str, Packed], products: Products) -> Plan:
    """What there is to do in a program, given the groups whose inputs are quantized and the weights that are packed."""
    by_site = {site: name for name, quant in inputs.items() for site in quant.sites}
    plan = Plan(products)
    for group in layout.groups:
        for member in group.members:
            name = group.name if group.kind == "attention" else by_site.get(member.site.path, "")
            reads = name in inputs and group.kind != "lookup"
            if reads or _is_packed(member.site, layout, packed):
                node = layout.graph.nodes[member.site.node]
                plan.contractions.setdefault(node.address, []).append(_for_site(group, member, name))
    for (index, i), body in layout.bodies.items():
        inner = make_plan(body, inputs, packed, products)
        if inner.contractions or inner.loops:
            node = layout.graph.nodes[index]
            _, plans = plan.loops.setdefault(node.address, (node, [Plan(products) for _ in node.bodies]))
            plans[i] = inner
    return plan


def _for_site(group: GroupPlan, member: Any, name: str) -> GroupPlan:
    return GroupPlan(name, group.kind, group.x, group.x_axes, (member,), group.start, group.x_shape)


def _is_packed(site: Site, layout: Layout, packed: dict[str, Packed]) -> bool:
    """Whether a site's weight can be handed to it: sliced by all the scans around it, or by none."""
    return _has(packed, _key(site)) and site.ref is not None and site.ref.depth in (0, layout.depth)


def _has(packed: dict[str, Packed], key: Key) -> bool:
    """Whether there is such a leaf that so many scans can slice: its first axes must not be packed or its columns."""
    path, depth = key
    return path in packed and packed[path].lead >= depth


def _keys(plan: Plan) -> set[Key]:
    return {_key(group.members[0].site) for group in plan.groups} - {("", 0)}


def _key(site: Site) -> Key:
    """Of the packed leaf that a site reads; none where layers do not lie first, for such a leaf cannot be sliced."""
    return (site.ref.path, site.ref.depth) if site.ref and not any(site.ref.axes) else ("", 0)


def interpret(closed: Any, args: list[Any], plan: Plan, held: Held, at: Address = ()) -> list[Any]:
    """Evaluates a jaxpr, quantizing at the contractions of `plan` and leaving everything else as it is."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    memo: dict[tuple, jax.Array] = {}

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    for i, eqn in enumerate(closed.jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        outs = _step(eqn, values, plan, held, (*at, i), memo)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in closed.jaxpr.outvars]


def _step(eqn: Any, values: list, plan: Plan, held: Held, at: Address, memo: dict) -> list[Any]:
    if at in plan.contractions:
        return _contract(eqn, values, plan.contractions[at], plan.products, held, memo)
    if at in plan.loops:
        return _loop(eqn, values, *plan.loops[at], held)
    if eqn.primitive.name in _compat.INLINED and plan.inside(at):
        return _call(eqn, values, plan, held, at)
    return _compat.bind(eqn, values)


def _contract(eqn: Any, values: list, groups: list[GroupPlan], products: Products, held: Held, memo: dict) -> list[Any]:
    values, biases, done = list(values), [], None

    def once(read: Callable, quant: InputQuant | None, group: GroupPlan, x: jax.Array, *options: Any) -> Any:
        key = (read, group.name, group.x_axes, id(x))
        if key not in memo:
            memo[key] = read(quant, x, group.x_axes, *options), x  # x, so that its id is not given to another array
        return memo[key][0]

    for group in groups:
        site = group.members[0].site
        quant, leaf = held.inputs.get(group.name), held.packed.get(_key(site))
        if group.kind == "lookup":
            done = look_up(eqn, leaf, values[1]) if leaf is not None and looks_up(eqn, site, leaf) else None
            continue
        x = values[site.operands.x]
        if leaf is not None and multiplies(eqn, site, x, leaf, quant, products):
            done = multiply(eqn, site, once(read_input, quant, group, x, products), leaf, products)
        if done is None and quant is not None:
            values[site.operands.x] = once(apply_input, quant, group, x)
        if quant is not None and site.path in quant.bias:
            biases.append(quant.bias[site.path])
    outs = _compat.bind(eqn, values) if done is None else [done]
    for bias in biases:
        outs = [outs[0] + bias.astype(outs[0].dtype)]
    return outs


def _call(eqn: Any, values: list, plan: Plan, held: Held, at: Address) -> list[Any]:
    """A call with something to do inside: its body is run in place; `remat` keeps its meaning, a custom derivative
    rule gives way to the derivative of the quantized body."""
    inner = _compat.called_jaxpr(eqn)
    if eqn.primitive.name not in _compat.REMAT:
        return interpret(inner, values, plan, held, at)

    def body(values: list, held: Held) -> list[Any]:
        return interpret(inner, values, plan, held, at)

    policy, prevent_cse = eqn.params.get("policy"), eqn.params.get("prevent_cse", True)
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(values, held)


def _loop(eqn: Any, values: list, node: Node, plans: list[Plan], held: Held) -> list[Any]:
    return {"scan": _scan, "while": _while, "cond": _cond}[node.name](eqn, values, plans, held)


def _scan(eqn: Any, values: list, plans: list[Plan], held: Held) -> list[Any]:
    """Rebuilds a scan; what its body needs of `held` has a leading layer axis and is scanned over."""
    split = _compat.scan_split(eqn)
    consts, rest = values[: split.consts], values[split.consts :]
    names, keys = {group.name for group in plans[0].groups}, _keys(plans[0])
    packed = {key: leaf for key, leaf in held.packed.items() if key in keys}
    layers = Held(
        {name: quant for name, quant in held.inputs.items() if name in names},
        {key: leaf for key, leaf in packed.items() if key[1]},
    )

    def body(carry: list, slices: tuple) -> tuple[list, list]:
        xs, layer = slices
        mine = Held(layer.inputs, packed | layer.packed)
        outs = interpret(eqn.params["jaxpr"], [*consts, *carry, *xs], plans[0], mine)
        return outs[: split.carry], outs[split.carry :]

    params = eqn.params
    carry, ys = lax.scan(
        body,
        rest[: split.carry],
        (rest[split.carry :], layers),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _while(eqn: Any, values: list, plans: list[Plan], held: Held) -> list[Any]:
    test, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    head, body = values[:test], values[test : test + consts]
    return lax.while_loop(
        lambda carry: interpret(eqn.params["cond_jaxpr"], [*head, *carry], plans[0], held)[0],
        lambda carry: interpret(eqn.params["body_jaxpr"], [*body, *carry], plans[1], held),
        values[test + consts :],
    )


def _cond(eqn: Any, values: list, plans: list[Plan], held: Held) -> list[Any]:
    def branch(closed: Any, plan: Plan) -> Callable:
        return lambda *args: interpret(closed, list(args), plan, held)

    branches = [branch(c, p) for c, p in zip(eqn.params["branches"], plans, strict=True)]
    return lax.switch(values[0], branches, *values[1:])
