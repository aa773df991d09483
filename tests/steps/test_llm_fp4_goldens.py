"""The published LLM-FP4 search, step by step: same losses, same choices. And ours on the same layers: no worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.formats import AnyFloat, Float, fake_quant, scale_of_bias
from jaxq.formats.floating import power_of_two, scale_from_width
from jaxq.search import exhaustive
from jaxq.steps.float_search import Found, search_grids
from jaxq.steps.output_error import (
    Metric,
    Problem,
    activation_problem,
    diagonal_hessian,
    output_error,
    plain_problem,
    weight_problem,
)
from jaxq.steps.parts import Reader

GOLDENS = Path(__file__).resolve().parents[2] / "../shared/goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="the published code's numbers (../shared) are not here")


def ieee_bias(bits: int, mantissa: jax.Array) -> jax.Array:
    """B = 2**(E - 1) - 1."""
    return (jnp.left_shift(1, bits - 2 - mantissa) - 1).astype(jnp.float32)


@dataclass(frozen=True)
class BiasMultiples:
    """The published candidates: multiples of the exponent *bias* of the unclipped scale, so that what they span depends
    on the tensor's unit (jaxq's are multiples of the scale). 1 is not among them; `whole` is the one nearest to it."""

    bits: int
    count: int = 100
    whole: int = 83

    def at(self, i: jax.Array, scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        ieee = ieee_bias(self.bits, mantissa)
        gamma = jnp.asarray(0.01 + np.arange(self.count) * (1.2 - 0.01) / 100, jnp.float32)[i]
        return jnp.exp2(ieee - gamma * (ieee - jnp.log2(scale)))


class State(NamedTuple):
    """How an operand is quantized at some moment: format, exponent biases, and the activation's channel exponents."""

    fmt: Float
    bias: np.ndarray
    exponents: np.ndarray


def snapped(legal: bool, fmt: Float, x: jax.Array, scale: jax.Array) -> jax.Array:
    """An operand as the other one's search sees it. The published code has one magnitude too many there (B11), 17
    levels of 4 bits, which jaxq has no format for; the goldens' `fixed__` arrays are of a run with n bits."""
    if legal:
        return fake_quant(fmt, x, scale)
    extra = 2.0 ** (2**fmt.exponent_bits - fmt.bias) if fmt.mantissa_bits else fmt.largest
    y = jnp.clip(x / scale, -extra, extra)
    exponent = jnp.maximum(jnp.frexp(y)[1] - 1, 1 - fmt.bias) - fmt.mantissa_bits
    return jnp.ldexp(jnp.rint(jnp.ldexp(y, -exponent)), exponent) * scale


class Tried(NamedTuple):
    """For each format every candidate's mean squared error and scale, [formats, candidates, rows]; what `search_grids`
    chose of them; and the error of given scales, [formats, rows]."""

    losses: np.ndarray
    scales: np.ndarray
    found: Found
    given: np.ndarray


@partial(jax.jit, static_argnums=(1, 2, 3))
def tried(
    problem: Problem, bits: int, metric: Metric, shared: bool, channel_biases: jax.Array | None, given: jax.Array
) -> tuple:
    grid, fmt = BiasMultiples(bits), AnyFloat(bits)
    v = problem.v[:, None]
    width = jnp.abs(v).max(None if shared else 2, keepdims=True)

    def spread(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        """Of 2**-k_j, k_j = clip(rint(b_j) - rint(r), 0, 2**E - 1). jaxq rounds once, clip(rint(b_j - r), ...): the
        exponent nearest to what the channel asks for, from which the published one may differ by 1; and down where
        that clips more than a step of 3 mantissa bits or more."""
        if channel_biases is None:
            return jnp.ones_like(scale)
        of_format = channel_biases[mantissa.ravel()[0] - fmt.splits[0].mantissa_bits]
        r = ieee_bias(bits, mantissa) - jnp.log2(scale)
        k = (jnp.rint(of_format)[None, None] - jnp.rint(r)).astype(jnp.int32)
        return power_of_two(-jnp.clip(k, 0, jnp.left_shift(1, bits - 1 - mantissa) - 1))

    def priced(scale: jax.Array, mantissa: jax.Array) -> jax.Array:
        hat = fake_quant(fmt, v, scale * spread(scale, mantissa), None, mantissa)
        loss = metric(problem, hat[:, 0])[:, 0]
        return loss.sum(keepdims=True) if shared else loss

    def of_format(per_format: tuple) -> tuple:
        mantissa, given = per_format
        whole = scale_from_width(fmt, width, mantissa)

        def of_candidate(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            scale = grid.at(i, whole, mantissa)
            return priced(scale, mantissa), scale.ravel()

        losses, scales = jax.lax.map(of_candidate, jnp.arange(grid.count))
        return losses, scales, priced(given.reshape(width.shape), mantissa)

    mantissas = jnp.asarray([f.mantissa_bits for f in fmt.splits], jnp.int32).reshape(-1, 1, 1, 1)
    found = search_grids(problem, fmt, grid, exhaustive(), metric, shared, 2**30, spread)
    return *jax.lax.map(of_format, (mantissas, given)), found


def scales_of(formats: tuple[Float, ...], biases: np.ndarray) -> jax.Array:
    return jnp.stack([scale_of_bias(f, jnp.asarray(b)) for f, b in zip(formats, biases, strict=True)])


class Replay:
    """One layer of the published search: each step from the published state before it."""

    def __init__(self, case: str, legal: bool) -> None:
        self.z, self.legal = np.load(GOLDENS / f"fpq_linear_{case}.npz"), legal
        self.bits, self.shifted = int(case[case.index("w") + 1]), case.startswith("fpq")
        self.formats = AnyFloat(self.bits).splits
        self.x, self.w = jnp.asarray(self.z["x"]), jnp.asarray(self.z["weight"])
        self.tokens = self.x.reshape(-1, self.x.shape[2])
        # Initially the configured format; its name is in that of the file.
        fmt = Float(int(case[-1]), self.bits - 1 - int(case[-1]))
        self.w_start = State(fmt, self["w_interval0"], np.zeros(1))
        self.x_start = self.input(fmt, self["a_interval0"], biases="a_bias0")

    def __getitem__(self, name: str) -> np.ndarray:
        return self.z[("fixed__" if self.legal else "") + name]

    def __contains__(self, name: str) -> bool:
        return ("fixed__" if self.legal else "") + name in self.z.files

    def weight(self, step: str, f: int | None = None) -> State:
        fmt = Float(*map(int, self[f"{step}_w_EM"])) if f is None else self.formats[f]
        return State(fmt, self[f"{step}_w_interval"] if f is None else self[f"{step}_w_intervals"][f], np.zeros(1))

    def input(self, fmt: Float, r: np.ndarray, stale: np.ndarray | None = None, biases: str = "a_biases") -> State:
        """`stale`: the r with which its channel exponents were made, where that is an older one."""
        if not self.shifted:
            return State(fmt, r, np.zeros(1))
        b = self[biases] if biases == "a_bias0" else self[biases][self.formats.index(fmt)]
        k = np.rint(b) - np.rint(r if stale is None else stale)
        return State(fmt, r, np.clip(k, 0, 2**fmt.exponent_bits - 1))

    def seen(self, operand: jax.Array, state: State) -> jax.Array:
        """[rows, channels] quantized; weights have a bias for each row."""
        scale = scale_of_bias(state.fmt, jnp.asarray(state.bias))[:, None]
        scale = scale * power_of_two(-jnp.asarray(state.exponents, jnp.int32))[None]
        return snapped(self.legal, state.fmt, operand, scale)

    def weights_tried(self, x: State, given: np.ndarray) -> Tried:
        """The weights' search for an input."""
        real = jnp.ones(self.x.shape[:2])
        problem = weight_problem(self.w, self.x, real, lambda batch: self.seen(batch, x), 1)
        fixed = jnp.square((self.tokens - self.seen(self.tokens, x)) @ self.w.T).sum(0)
        return self._tried(problem, False, None, given, fixed, len(self.tokens))

    def inputs_tried(self, w: State, given: np.ndarray) -> Tried:
        """The activation's search for weights."""
        w_hat = self.seen(self.w, w)
        reader = Reader(len(w_hat), lambda part: (part.of(self.w), part.of(w_hat)))
        problem = activation_problem(self.tokens, jnp.ones(len(self.tokens)), [reader])
        fixed = jnp.square(self.tokens @ (self.w - w_hat).T).sum(keepdims=True).ravel()
        biases = jnp.asarray(self["a_biases"]) if self.shifted else None
        return self._tried(problem, True, biases, given, fixed, len(self.tokens) * len(self.w))

    def _tried(self, problem, shared, biases, given, fixed, count) -> Tried:
        out = tried(problem, self.bits, output_error, shared, biases, scales_of(self.formats, given))
        losses, scales, at_given, found, fixed = jax.tree.map(np.asarray, (*out, fixed))
        return Tried((losses + fixed) / count, scales, found, (at_given + fixed) / count)

    def check_interval(self, step: str, side: str, got: Tried) -> None:
        """Losses of all candidates, where they are on file, and the choice for each format and row."""
        if f"{step}_{side}_sim" in self:
            mean = -self[f"{step}_{side}_sim"].reshape(got.losses.shape) / len(self.x)  # theirs is summed over batches
            error = np.abs(got.losses / mean - 1)
            assert np.median(error) < 1e-4
            assert np.quantile(error, 0.9999) < 2e-2  # one code of a row may flip at a tie
        theirs = self[f"{step}_{side}_idx"].reshape(len(self.formats), -1)
        ours, best = got.losses.argmin(1), got.losses.min(1)
        same = ours == theirs
        assert same.mean() > 0.98
        assert (np.take_along_axis(got.losses, theirs[:, None], 1)[:, 0] <= best * (1 + 2e-3)).all()
        chosen = np.take_along_axis(got.scales, ours[:, None], 1)[:, 0]
        biases = np.asarray([f.bias for f in self.formats])[:, None] - np.log2(chosen)
        np.testing.assert_allclose(biases[same], self[f"{step}_{side}_intervals"][same], rtol=1e-5, atol=1e-5)
        f = int(best.sum(1).argmin())
        assert got.found.mantissa.item() == self.formats[f].mantissa_bits
        np.testing.assert_array_equal(got.found.scale.ravel(), chosen[f])

    def check_format(self, step: str, side: str, got: Tried) -> None:
        """The formats' losses, each with its chosen biases, and the choice."""
        np.testing.assert_allclose(got.given.mean(1), -self[f"{step}_{side}_fmt_sim"], rtol=2e-3)
        best = self.formats[int(got.given.mean(1).argmin())]
        assert (best.exponent_bits, best.mantissa_bits) == tuple(self[f"{step}_{side}_EM"])

    def shifted_round(self, step: str, w: State, x: State) -> None:
        """Both intervals, then both formats. From the second round on, the operands that a search is given already have
        the new interval of their old format (which is stored in place), the input with its old channel exponents."""
        ws, xs, first = self[f"{step}_w_intervals"], self[f"{step}_a_intervals"], step == "r0_"
        self.check_interval(step, "w", self.weights_tried(x, ws))
        w_seen = w if first else self.weight(step, self.formats.index(w.fmt))
        self.check_interval(step, "a", self.inputs_tried(w_seen, xs))
        x_seen = x if first else self.input(x.fmt, xs[self.formats.index(x.fmt)], stale=x.bias)
        self.check_format(step, "w", self.weights_tried(x_seen, ws))
        self.check_format(step, "a", self.inputs_tried(self.weight(step), xs))

    def plain_round(self, step: str, x: State) -> None:
        """The weights' interval and format, then the input's."""
        ws, xs = self[f"{step}_w_intervals"], self[f"{step}_a_intervals"]
        for side, got in (
            ("w", self.weights_tried(x, ws)),
            ("a", self.inputs_tried(self.weight(step), xs)),
        ):
            self.check_interval(step, side, got)
            self.check_format(step, side, got)
            assert got.found.mantissa.item() == self[f"{step}_{side}_EM"][1]

    def rounds(self) -> None:
        w, x = self.w_start, self.x_start
        for step in ("r0_", "r1_", "r2_"):
            if self.shifted:
                self.shifted_round(step, w, x)
            else:
                self.plain_round(step, x)
            w = self.weight(step)
            x = self.input(Float(*map(int, self[f"{step}_a_EM"])), self[f"{step}_a_interval"])
        self.check_result(w, x)

    def check_result(self, w: State, x: State) -> None:
        if self.shifted:
            np.testing.assert_array_equal(x.exponents, self["final_a_channel_int_offset"])
        w_hat, x_hat = self.seen(self.w, w), self.seen(self.tokens, x)
        for ours, theirs in ((w_hat, self["q_weight"]), (x_hat, self["q_input"].reshape(self.tokens.shape))):
            close = np.isclose(ours, theirs, rtol=1e-5, atol=0)
            assert (~close).mean() < 1e-3  # ties
        mse = jnp.square(x_hat @ w_hat.T - self.tokens @ self.w.T).mean()
        np.testing.assert_allclose(mse, self["mse"], rtol=1e-3)


@pytest.mark.parametrize("legal", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["n_bits", "published"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("baseline_w4a4e2", marks=pytest.mark.slow),
        "fpq_w4a4e2",
        pytest.param("fpq_w6a6e3", marks=pytest.mark.slow),
    ],
)
def test_every_step_of_the_published_search(case: str, legal: bool) -> None:
    Replay(case, legal).rounds()


@pytest.mark.parametrize("bits", [4, pytest.param(6, marks=pytest.mark.slow), 8])
def test_the_published_search_of_an_embedding(bits: int) -> None:
    """Row by row; then the format. Its rounds repeat the first one."""
    z = np.load(GOLDENS / "fpq_embedding.npz")
    name, w, formats = f"fpq_baseline__e{bits}__", jnp.asarray(z["weight"]), AnyFloat(bits).splits
    problem = plain_problem(w, jnp.ones((1, w.shape[1])), jnp.ones(len(w)))
    given = scales_of(formats, z[f"{name}r0__intervals"])
    losses, scales, at_given, found = tried(problem, bits, diagonal_hessian, False, None, given)
    losses, scales, at_given = np.asarray(losses), np.asarray(scales), np.asarray(at_given) / w.shape[1]
    assert (at_given * w.shape[1] <= losses.min(1) * (1 + 2e-3)).all()
    np.testing.assert_allclose(at_given.mean(1), -z[f"{name}r0__fmt_sim"], rtol=1e-4)
    chosen = np.take_along_axis(scales, losses.argmin(1)[:, None], 1)[:, 0]
    biases = np.asarray([f.bias for f in formats])[:, None] - np.log2(chosen)
    assert np.isclose(biases, z[f"{name}r0__intervals"], rtol=1e-5, atol=1e-5).mean() > 0.98
    # Of 8 bits the published exponent bits are too many by 2 (B14): the mantissa says what was chosen.
    assert found.mantissa.item() == z[f"{name}EM"][1]
    if bits < 8:  # and so its 8-bit table is not one of 8 bits
        fmt = formats[int(at_given.mean(1).argmin())]
        scale = scale_of_bias(fmt, jnp.asarray(z[f"{name}interval"]))[:, None]
        theirs = z[f"{name}q_weight"]
        np.testing.assert_allclose(snapped(False, fmt, w, scale), theirs, rtol=1e-5)
        legal = jnp.clip(theirs, -fmt.largest * scale, fmt.largest * scale)
        np.testing.assert_allclose(fake_quant(fmt, w, scale), legal, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_published_embedding_of_one_grid(bits: int) -> None:
    """Its range reaches to the extra magnitude (B11), jaxq's to the largest of the format."""
    z, fmt = np.load(GOLDENS / "fpq_embedding.npz"), AnyFloat(bits).usual
    assert tuple(z[f"minmax__e{bits}__EM"]) == (fmt.exponent_bits, fmt.mantissa_bits)
    widest = jnp.abs(jnp.asarray(z["weight"])).max()
    scale = scale_from_width(fmt, widest, None)
    extra = 2 / (2 - 2.0**-fmt.mantissa_bits)
    np.testing.assert_allclose(fmt.bias - np.log2(scale / extra), z[f"minmax__e{bits}__interval"][0], rtol=1e-5)


def layer(z) -> tuple[Callable, dict[str, jax.Array], list[jax.Array]]:
    params = {"w": jnp.asarray(z["weight"]), "b": jnp.asarray(z["bias"])}
    return lambda p, x: x @ p["w"].T + p["b"][None], params, list(jnp.asarray(z["x"]))


def quantized_error(z, recipe: jaxq.steps.Step) -> tuple[float, jaxq.Quantized]:
    forward, params, xs = layer(z)
    quantized = jaxq.calibrate(forward, params, xs, recipe)
    run = jax.jit(jaxq.execute(forward))
    return float(np.mean([jnp.square(run(quantized, x) - forward(params, x)).mean() for x in xs])), quantized


FAST, FULL = jaxq.FloatSearch(), jaxq.FloatSearch(method=exhaustive())


@pytest.mark.parametrize(
    ("case", "make", "search", "slack"),
    [
        ("baseline_w4a4e2", jaxq.fpq_baseline, FAST, 1),
        pytest.param("baseline_w4a4e2", jaxq.fpq_baseline, FULL, 1, marks=pytest.mark.slow),
        ("fpq_w4a4e2", jaxq.llm_fp4, FAST, 1),
        pytest.param("fpq_w4a4e2", jaxq.llm_fp4, FULL, 1, marks=pytest.mark.slow),
        ("fpq_w4a4e2", jaxq.post_shifted_fp4, FAST, 1),
        pytest.param("fpq_w4a4e2", jaxq.post_shifted_fp4, FULL, 1, marks=pytest.mark.slow),
        pytest.param("fpq_w6a6e3", jaxq.llm_fp4, FAST, 1, marks=pytest.mark.slow),
    ],
)
def test_no_worse_than_the_published_result(case: str, make: Callable, search: jaxq.FloatSearch, slack: float) -> None:
    z, bits = np.load(GOLDENS / f"fpq_linear_{case}.npz"), int(case[-3])
    mse, quantized = quantized_error(z, make(bits, bits, search=search))
    assert mse <= z["fixed__mse"] * slack
    w = quantized.params["w"]
    values = w.dequantize() if w.exponents is None else replace(w, exponents=None).dequantize()
    assert max(len(np.unique(np.abs(row) * np.sign(row))) for row in np.asarray(values)) <= 2**bits - 1


def test_rounding_to_nearest_is_the_published_one() -> None:
    z = np.load(GOLDENS / "fpq_linear_minmax_w4a4e2.npz")
    mse, quantized = quantized_error(z, jaxq.quantize(jaxq.Float(2, 1), jaxq.Float(2, 1)))
    np.testing.assert_allclose(mse, z["fixed__mse"], rtol=1e-3)
    theirs = z["fixed__q_weight"]
    assert np.isclose(quantized.params["w"].dequantize(), theirs, rtol=1e-5, atol=0).mean() > 0.999
