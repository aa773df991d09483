"""The published code's searches, candidate by candidate: same losses, same choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.quantizer import per_channel, per_group, per_tensor, per_token
from jaxq.search import exhaustive
from jaxq.steps import Group, Step, as_the_paper, channel_range, quantize
from jaxq.steps.os_plus import scale_for, search_scale, thresholds
from jaxq.steps.shift import middle, touch

GOLDENS = Path(__file__).resolve().parents[2] / "../shared/goldens"
pytestmark = pytest.mark.skipif(not GOLDENS.exists(), reason="the published code's numbers (../shared) are not here")

SETTINGS = {
    "w8a8_sym_pt_pt": quantize(per_tensor(jaxq.Int(8)), per_tensor(jaxq.Int(8))),
    "w6a6_asym_pt_pc": quantize(per_channel(jaxq.Int(6, False)), per_tensor(jaxq.Int(6, False))),
    "w4a4_asym_token_pc": quantize(per_channel(jaxq.Int(4, False)), per_token(jaxq.Int(4, False))),
    "w6a6_asym_token_pc": quantize(per_channel(jaxq.Int(6, False)), per_token(jaxq.Int(6, False))),
    "w4a4_asym_group": quantize(per_group(jaxq.Int(4, False), 16), per_group(jaxq.Int(4, False), 16)),
}


def heads(y: jax.Array, count: int) -> jax.Array:
    return y.reshape(*y.shape[:2], count, -1).transpose(0, 2, 1, 3)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    floor = jnp.finfo(jnp.float32).min
    scores = jnp.maximum(q @ k.transpose(0, 1, 3, 2) + bias, floor)
    out = jax.nn.softmax(scores, -1) @ v
    return out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)


def opt_qkv(z):
    n = int(z["num_heads"])

    def forward(params, x, mask):
        q, k, v = (heads(y, n) for y in jnp.split(x @ params["w"] + params["b"][None, None], 3, -1))
        return attend(q * z["scaling"], k, v, mask) @ params["next"]

    return forward, (z["attention_mask"],)


def bloom_qkv(z):
    """With the published code's [3, heads, dim] split; `fixedlayout` is the same code on rows that fit it (B2)."""
    n = int(z["num_heads"])
    alibi = z["alibi"].reshape(z["x"].shape[0], n, 1, -1)

    def forward(params, x, hidden):
        q, k, v = (heads(y, n) for y in jnp.split(x @ params["w"] + params["b"][None, None], 3, -1))
        scores = jnp.asarray(alibi) + z["scaling"] * (q @ k.transpose(0, 1, 3, 2))
        scores = jnp.where(hidden, jnp.finfo(jnp.float32).min, scores)
        out = (jax.nn.softmax(scores, -1) @ v).transpose(0, 2, 1, 3)
        return out.reshape(x.shape) @ params["next"]

    return forward, (z["attention_mask_bool"],)


def llama_qkv(z):
    n, t = int(z["num_heads"]), z["x"].shape[1]
    cos, sin = (jnp.asarray(z[k][:, :, :t]) for k in ("cos_cached", "sin_cached"))

    def turn(y):
        half = y.shape[-1] // 2
        return y * cos + jnp.concatenate([-y[..., half:], y[..., :half]], -1) * sin

    def forward(params, x, mask):
        q, k, v = (heads(y, n) for y in jnp.split(x @ params["w"], 3, -1))
        scale = jnp.float32(np.sqrt(int(z["head_dim"])))
        return attend(turn(q) / scale, turn(k), v, mask) @ params["next"]

    return forward, (z["attention_mask"],)


def up_gate(z):
    def forward(params, x):
        gate, up = jnp.split(x @ params["w"], 2, -1)
        return (jax.nn.silu(gate) * up) @ params["next"]

    return forward, ()


def plain(z):
    return lambda params, x: x @ params["w"], ()


CASES = {
    "osp_opt_qkv": opt_qkv,
    "osp_opt_qkv_pad": opt_qkv,
    "osp_opt_fc1": plain,
    "osp_bloom_qkv": bloom_qkv,
    "osp_bloom_qkv_fixedlayout": bloom_qkv,
    "osp_llama_qkv": llama_qkv,
    "osp_llama_upgate": up_gate,
    "osp_llama_down": plain,
}


def kept(group: Group) -> Group:
    """The group with its objectives cut now: later the walk has moved on."""
    pieces = group.objectives
    return replace(group, find_objectives=lambda: pieces)


def capture(z, case: str, setting: str) -> Group:
    """The group of `w` as a step receives it."""
    forward, others = CASES[case](z)
    params = {"w": jnp.asarray(z["weight"].T), "next": jnp.eye(64 if "upgate" not in case else 96)}
    if "bias_shifted" in z:
        params["b"] = jnp.asarray(z["bias_shifted"])
    seen: list[Group] = []
    keep = Step(touch(lambda plan: plan.name == "w"), lambda group: seen.append(kept(group)) or group)
    recipe = jaxq.chain(keep, jaxq.partition({"w": SETTINGS[setting]}))
    mask = z["observation_mask"]
    jaxq.calibrate(forward, params, [(jnp.asarray(z["x"]), *map(jnp.asarray, others))], recipe, masks=[mask])
    return seen[0]


def all_cases() -> list[tuple[str, str]]:
    found = []
    for case in CASES:
        path = GOLDENS / f"{case}.npz"
        names = np.load(path).files if path.exists() else []
        found += [(case, s) for s in SETTINGS if f"{s}__cand_loss" in names]
    return found


@pytest.mark.parametrize(("case", "setting"), all_cases())
def test_candidate_losses_and_choice(case: str, setting: str) -> None:
    z = np.load(GOLDENS / f"{case}.npz")
    group = capture(z, case, setting)
    # The published code ranges over padded tokens too (B4): its candidates and scales need its ranges.
    low, high = (jnp.asarray(f(z["x"], (0, 1))) for f in (np.min, np.max))
    lower = 0.1 if "llama" in case else 1.0
    grid = thresholds(low, high, lower, 100)
    np.testing.assert_allclose(grid, z[f"{setting}__cand_range"], rtol=1e-6)
    best, losses = search_scale(group, as_the_paper(group.objectives), grid, low, high, exhaustive())
    expected = z[f"{setting}__cand_loss"]
    error = np.abs(losses - expected) / expected
    assert np.median(error) < 1e-4
    assert error.max() < 2e-2
    theirs = int(z[f"{setting}__best_idx"])
    assert best == theirs or expected[best] <= expected[theirs] * (1 + 2e-3)
    if best == theirs:
        ours = scale_for(jnp.float32(grid[best]), low, high)
        np.testing.assert_allclose(ours, z[f"{setting}__best_scale"], rtol=1e-5)


@pytest.mark.parametrize("case", ["osp_opt_qkv", "osp_opt_fc1", "osp_bloom_qkv"])
def test_shift(case: str) -> None:
    z = np.load(GOLDENS / f"{case}.npz")
    low, high = (jnp.asarray(f(z["x_raw"], (0, 1))) for f in (np.min, np.max))
    np.testing.assert_array_equal(middle(low, high), z["shift"])


def test_padding_does_not_enter_ranges() -> None:
    """Where the published code lets padding into the channel ranges (B4), jaxq does not."""
    z = np.load(GOLDENS / "osp_opt_qkv_pad.npz")
    group = capture(z, "osp_opt_qkv_pad", "w8a8_sym_pt_pt")
    real = z["x"][z["observation_mask"].astype(bool)]
    low, high = channel_range(group)
    np.testing.assert_array_equal(low, real.min(0))
    np.testing.assert_array_equal(high, real.max(0))
    assert (np.asarray(low) > z["x"].min((0, 1))).any()
