"""Segments: pieces of a graph that are compiled once wherever they occur."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxq.program.segments import cut, evaluate, run
from jaxq.program.trace import trace
from tests.zoo.specimen import block, block_params, normal

P = {"layers": [block_params(20 * i, 16) for i in range(2)]}
X = normal(0, 2, 5, 16)


def graph_of(f, *args):
    return trace(f, *args).layout.graph


def test_equal_layers_are_one_segment():
    graph = graph_of(lambda p, x: block(p["layers"][1], block(p["layers"][0], x)), P, X)
    half = len(graph.nodes) // 2
    first, second = (cut(graph, part, part[-1].outs) for part in (graph.nodes[:half], graph.nodes[half:]))
    assert first == second and hash(first) == hash(second)
    assert first.reads != second.reads


def test_unlike_computations_are_unlike_segments():
    def segment(f):
        graph = graph_of(lambda p, x: f(x), {"w": X}, X)
        return cut(graph, graph.nodes, graph.outputs)

    table = jnp.arange(5.0), jnp.arange(5.0)[::-1]
    unlike = [
        segment(f)
        for f in (
            jnp.tanh, jnp.sin, lambda x: x * 2.0, lambda x: x * 3.0, lambda x: x.sum(0), lambda x: x.sum(1),
            lambda x: jnp.einsum("btc,bsc->bts", x, x), lambda x: x + table[0][None, :, None],
            lambda x: x + table[1][None, :, None],
        )
    ]  # fmt: skip
    same_program_other_constant = unlike[-2:]
    assert len(set(unlike[:-2])) == len(unlike) - 2
    # A constant is an input of a segment, not a part of it.
    assert len(set(same_program_other_constant)) == 1


def test_a_segment_computes_what_the_program_does():
    f = lambda p, x: block(p["layers"][0], x)  # noqa: E731
    graph = graph_of(f, P, X)
    segment = cut(graph, graph.nodes, graph.outputs)
    leaves = dict(zip(graph.inputs, [*jax.tree.leaves(P), X]))
    values = [leaves[v] if v in leaves else graph.consts[v] for v in segment.reads]
    np.testing.assert_array_equal(evaluate(segment, values)[0], f(P, X))
    np.testing.assert_array_equal(run(segment, values)[0], jax.jit(f)(P, X))


def test_dead_code_and_what_lies_before_a_stop_are_left_out():
    def f(p, x):
        unused = jnp.cosh(x)
        y = jnp.tanh(x)
        return jnp.sin(y), unused

    graph = graph_of(f, {"w": X}, X)
    (middle,) = (n.outs[0] for n in graph.nodes if n.name == "tanh")
    segment = cut(graph, graph.nodes, [graph.outputs[0]], stop=[middle])
    assert [op.eqn.primitive.name for op in segment.ops] == ["sin"] and segment.reads == (middle,)
