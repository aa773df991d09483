"""`execute`: the function transform that runs a forward function on a quantized parameter tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import jax
from jax import lax
from jax.core import Tracer

from jaxq.contraction import apply_input
from jaxq.program import _compat
from jaxq.program.graph import Node
from jaxq.program.groups import GroupPlan, Layout, skipped_in
from jaxq.program.trace import Program, abstract, trace
from jaxq.qtensor import InputQuant, Quantized, is_qtensor, logical

Address = tuple[int, ...]


@dataclass
class Plan:
    """Where, in one jaxpr, something has to be done: contractions by address, loops with something inside."""

    contractions: dict[Address, list[GroupPlan]] = field(default_factory=dict)
    loops: dict[Address, tuple[Node, list[Plan]]] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        own = {g.name for groups in self.contractions.values() for g in groups}
        return own.union(*(plan.names for _, plans in self.loops.values() for plan in plans))

    def inside(self, at: Address) -> bool:
        """Whether the call at this address contains anything to do."""
        return any(a[: len(at)] == at for a in (*self.contractions, *self.loops) if len(a) > len(at))


def execute(forward: Callable) -> Callable:
    """The same function, run in low precision where its parameters say so.

    Args:
      forward: `forward(params, *inputs) -> outputs`, any traceable function over any pytree of arrays.

    Returns:
      A function of the same signature that also takes what `calibrate` returns in place of `params`. Quantized
      weights stand for the arrays they encode, and the inputs of each group are shifted, scaled and fake-quantized
      just before its contractions. With a plain tree it computes what `forward` computes, bit for bit. It can be
      transformed by `jit`, `grad` (straight-through), `vmap` and `jax.export`.
    """
    programs: dict[Any, Program] = {}

    @wraps(forward)
    def run(params: Any, *inputs: Any) -> Any:
        quantized = params if isinstance(params, Quantized) else Quantized(params)
        program = _cached(programs, forward, quantized.params, inputs)
        leaves = jax.tree.leaves(logical(quantized.params)) + jax.tree.leaves(inputs)
        plan = make_plan(program.layout, quantized.inputs)
        _check_left_out(program.layout, quantized.inputs)
        outs = interpret(program.closed, leaves, plan, quantized.inputs)
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


def make_plan(layout: Layout, inputs: dict[str, InputQuant]) -> Plan:
    """What there is to do in a program, given the groups whose inputs are quantized."""
    by_site = {site: name for name, quant in inputs.items() for site in quant.sites}
    plan = Plan()
    for group in layout.groups:
        for member in group.members:
            name = group.name if group.kind == "attention" else by_site.get(member.site.path)
            if group.kind != "lookup" and name in inputs:
                node = layout.graph.nodes[member.site.node]
                plan.contractions.setdefault(node.address, []).append(_for_site(group, member, name))
    for (index, i), body in layout.bodies.items():
        inner = make_plan(body, inputs)
        if inner.contractions or inner.loops:
            node = layout.graph.nodes[index]
            _, plans = plan.loops.setdefault(node.address, (node, [Plan() for _ in node.bodies]))
            plans[i] = inner
    return plan


def _for_site(group: GroupPlan, member: Any, name: str) -> GroupPlan:
    return GroupPlan(name, group.kind, group.x, group.x_axes, (member,), group.start, group.x_shape)


def interpret(closed: Any, args: list[Any], plan: Plan, inputs: dict[str, InputQuant], at: Address = ()) -> list[Any]:
    """Evaluates a jaxpr, quantizing at the contractions of `plan` and leaving everything else as it is."""
    env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env.update(zip(closed.jaxpr.invars, args, strict=True))
    memo: dict[tuple, jax.Array] = {}

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else env[atom]

    for i, eqn in enumerate(closed.jaxpr.eqns):
        values = [read(a) for a in eqn.invars]
        outs = _step(eqn, values, plan, inputs, (*at, i), memo)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(a) for a in closed.jaxpr.outvars]


def _step(eqn: Any, values: list, plan: Plan, inputs: dict[str, InputQuant], at: Address, memo: dict) -> list[Any]:
    if at in plan.contractions:
        return _contract(eqn, values, plan.contractions[at], inputs, memo)
    if at in plan.loops:
        return _loop(eqn, values, *plan.loops[at], inputs)
    if eqn.primitive.name in _compat.INLINED and plan.inside(at):
        return _call(eqn, values, plan, inputs, at)
    return _compat.bind(eqn, values)


def _contract(eqn: Any, values: list, groups: list[GroupPlan], inputs: dict[str, InputQuant], memo: dict) -> list[Any]:
    values, biases = list(values), []
    for group in groups:
        site, quant = group.members[0].site, inputs[group.name]
        x = values[site.operands.x]
        key = (group.name, id(x))
        if key not in memo:
            memo[key] = apply_input(quant, x, group.x_axes)
            memo[key, "kept"] = x  # so that its id is not given to another array
        values[site.operands.x] = memo[key]
        if site.path in quant.bias:
            biases.append(quant.bias[site.path])
    outs = _compat.bind(eqn, values)
    for bias in biases:
        outs = [outs[0] + bias.astype(outs[0].dtype)]
    return outs


def _call(eqn: Any, values: list, plan: Plan, inputs: dict[str, InputQuant], at: Address) -> list[Any]:
    """A call with something to do inside: its body is run in place; `remat` keeps its meaning, a custom derivative
    rule gives way to the derivative of the quantized body."""
    inner = _compat.called_jaxpr(eqn)
    if eqn.primitive.name not in _compat.REMAT:
        return interpret(inner, values, plan, inputs, at)

    def body(values: list, inputs: dict[str, InputQuant]) -> list[Any]:
        return interpret(inner, values, plan, inputs, at)

    policy, prevent_cse = eqn.params.get("policy"), eqn.params.get("prevent_cse", True)
    return jax.checkpoint(body, policy=policy, prevent_cse=prevent_cse)(values, inputs)


def _loop(eqn: Any, values: list, node: Node, plans: list[Plan], inputs: dict[str, InputQuant]) -> list[Any]:
    return {"scan": _scan, "while": _while, "cond": _cond}[node.name](eqn, values, plans, inputs)


def _scan(eqn: Any, values: list, plans: list[Plan], inputs: dict[str, InputQuant]) -> list[Any]:
    """Rebuilds a scan; what its body needs of `inputs` has a leading layer axis and is scanned over."""
    split = _compat.scan_split(eqn)
    consts, rest = values[: split.consts], values[split.consts :]
    mine = {name: inputs[name] for name in plans[0].names}

    def body(carry: list, slices: tuple) -> tuple[list, list]:
        xs, layer = slices
        outs = interpret(eqn.params["jaxpr"], [*consts, *carry, *xs], plans[0], layer)
        return outs[: split.carry], outs[split.carry :]

    params = eqn.params
    carry, ys = lax.scan(
        body,
        rest[: split.carry],
        (rest[split.carry :], mine),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _while(eqn: Any, values: list, plans: list[Plan], inputs: dict[str, InputQuant]) -> list[Any]:
    test, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    head, body = values[:test], values[test : test + consts]
    return lax.while_loop(
        lambda carry: interpret(eqn.params["cond_jaxpr"], [*head, *carry], plans[0], inputs)[0],
        lambda carry: interpret(eqn.params["body_jaxpr"], [*body, *carry], plans[1], inputs),
        values[test + consts :],
    )


def _cond(eqn: Any, values: list, plans: list[Plan], inputs: dict[str, InputQuant]) -> list[Any]:
    def branch(closed: Any, plan: Plan) -> Callable:
        return lambda *args: interpret(closed, list(args), plan, inputs)

    branches = [branch(c, p) for c, p in zip(eqn.params["branches"], plans, strict=True)]
    return lax.switch(values[0], branches, *values[1:])
