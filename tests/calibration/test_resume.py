"""An interrupted calibration goes on from its records and ends with the same result."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxq
from jaxq.calibration import resume
from jaxq.steps import Group, Step, run_time_shift
from tests.zoo.specimen import block, block_params, linear, linear_params, norm, norm_params, normal, tokens, weight

RAN: list[str] = []  # the groups that the recipe worked on; a step that closed over the list would change with it


def noted(step: Step) -> Step:
    def apply(group: Group) -> Group:
        RAN.append(group.plan.name)
        return step.apply(group)

    return step._replace(apply=apply)


@dataclass(frozen=True)
class Case:
    forward: Any
    params: Any
    batches: tuple[Any, ...]
    recipe: Step
    masks: Any = None
    propagate: Any = "quantized"

    def run(self, folder: Path | None, stop: int | None = None) -> tuple[jaxq.Quantized, list[Group]]:
        """The result and the reported groups; `stop`: interrupted at the report of that group."""
        groups: list[Group] = []

        def on_group(group: Group) -> None:
            if len(groups) == stop:
                raise KeyboardInterrupt
            groups.append(group)

        RAN.clear()
        arguments = {"masks": self.masks, "propagate": self.propagate, "on_group": on_group, "checkpoint": folder}
        return jaxq.calibrate(self.forward, self.params, self.batches, noted(self.recipe), **arguments), groups


RECIPE = jaxq.chain(
    jaxq.os_plus(), jaxq.quantize(jaxq.Int(4, symmetric=False), jaxq.Int(6, symmetric=False), attention=jaxq.Int(8))
)


def layered(p, t):
    x = p["embed"][t]
    for layer in p["layers"]:
        x = block(layer, x)
    return norm(x, p["ln"]) @ p["head"]


def scanned(p, t):
    x, _ = lax.scan(lambda x, layer: (block(layer, x), None), p["embed"][t], p["layers"])
    return norm(x, p["ln"]) @ p["head"]


def branched(p, t, flag):
    x = p["embed"][t]
    one, other = p["layers"]
    x = lax.cond(flag, lambda x: block(one, x), lambda x: x + linear(x, other["fc1"]) @ p["down"], x)
    return norm(x, p["ln"]) @ p["head"]


def gated(p, x):
    h = norm(x, p["ln"])
    return linear(jax.nn.silu(linear(h, p["gate"])) * linear(h, p["up"]), p["down"])


@cache
def case(name: str) -> Case:
    params = {"embed": 3 * normal(0, 40, 16), "ln": norm_params(1, 16), "head": weight(2, 16, 40)}
    layers = [block_params(20 * i, 16) for i in range(2)]
    batches = (tokens(3, 2, 6), tokens(4, 2, 6))
    masks = [jnp.arange(6)[None] < jnp.array(lengths)[:, None] for lengths in ((6, 4), (3, 6))]
    if name == "layers":
        return Case(layered, {**params, "layers": layers}, batches, RECIPE, masks)
    if name == "scan":
        stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
        return Case(scanned, {**params, "layers": stacked}, batches, RECIPE, masks)
    if name == "cond":
        params |= {"layers": layers, "down": weight(5, 32, 16)}
        both = tuple((t, jnp.bool_(i)) for i, t in enumerate(batches))
        return Case(branched, params, both, RECIPE, propagate="full_precision")
    square = {n: linear_params(i, 16, 16, bias=False) for i, n in enumerate(("gate", "up", "down"))}
    shifted = jaxq.chain(run_time_shift(), RECIPE)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), {"ln": norm_params(1, 16), **square})
    return Case(gated, half, (normal(7, 2, 5, 16, dtype=jnp.bfloat16) + jnp.bfloat16(1),), shifted)


@cache
def whole(name: str) -> tuple[jaxq.Quantized, list[Group]]:
    """Without a checkpoint and in one go."""
    return case(name).run(None)


def assert_same(a: Any, b: Any) -> None:
    """Equal containers, static fields, types (weak ones too) and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert jax.typeof(x) == jax.typeof(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("layers", marks=pytest.mark.slow),
        pytest.param("scan", marks=pytest.mark.slow),
        pytest.param("cond", marks=pytest.mark.slow),
        "run-time shift",
    ],
)
def test_an_interrupted_run_ends_with_the_same(name, tmp_path):
    want, reported = whole(name)
    assert want.transforms and len(want.inputs) > 1
    for stop in sorted({0, 1, len(reported) // 2, len(reported) - 1}):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            case(name).run(folder, stop)
        assert len(list(folder.iterdir())) == stop + 1
        got, groups = case(name).run(folder)
        assert len(RAN) == len(reported) - stop - 1, "the finished groups were not done again"
        assert_same(got, want)
        for group, other in zip(groups, reported, strict=True):
            assert group.plan.name == other.plan.name
            jax.tree.map(np.testing.assert_array_equal, group.log, other.log)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=1e-5), group.x, other.x)
    assert_same(case(name).run(folder)[0], want)
    assert not RAN, "all is there"


def test_inside_a_scan_each_layer_has_its_records(tmp_path):
    cases = {name: replace(case(name), recipe=jaxq.quantize()) for name in ("layers", "scan")}
    one, other = (len(c.run(tmp_path / name)[1]) for name, c in cases.items())
    assert one == other == len(list((tmp_path / "scan").iterdir()))


def halved(case: Case, *path: str) -> Case:
    """With one parameter changed."""

    def change(keys: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        return leaf * jnp.float32(0.5) if name in path else leaf

    return replace(case, params=jax.tree_util.tree_map_with_path(change, case.params))


OTHERS = {
    "the recipe": lambda c: replace(c, recipe=jaxq.chain(jaxq.os_plus(jaxq.steps.nothing()), RECIPE)),
    "the batches": lambda c: replace(c, batches=c.batches[::-1]),
    "the masks": lambda c: replace(c, masks=c.masks[::-1]),
    "`propagate`": lambda c: replace(c, propagate="full_precision"),
    "the program": lambda c: replace(c, forward=lambda p, t: layered(p, t) * jnp.float32(2)),
    "its parameters": lambda c: halved(c, "layers/0/attn/k/kernel"),
    "its activation": lambda c: halved(c, "embed"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_calibration_is_refused(what, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        case("layers").run(tmp_path / "kept", 1)
    with pytest.raises(ValueError, match=f"00000.safetensors was recorded by.*different are .*{what}") as error:
        OTHERS[what](case("layers")).run(tmp_path / "kept")
    assert f"remove {tmp_path / 'kept'}" in str(error.value)
    listed = str(error.value).partition("different are ")[2].partition(". ")[0]
    assert set(listed.split(", ")) <= {what, "its activation"}, "a reversed order of batches is also another activation"


def test_a_later_version_of_jaxq_is_told_apart(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        case("layers").run(tmp_path, 0)
    monkeypatch.setattr(jaxq, "__version__", "1000")
    with pytest.raises(ValueError, match="different are the versions of jaxq and JAX"):
        case("layers").run(tmp_path)


def flipped(data: bytes, where: bytes) -> bytes:
    at = data.index(where)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:100],
    "cut in the arrays": lambda data: data[:-10],
    "a bit of an array": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "a bit of the description": lambda data: flipped(data, b"the masks"),
    "something else": lambda data: b"Once upon a time there was a file. " * 10,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_is_named_and_made_again_once_deleted(how, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        case("layers").run(tmp_path, 2)
    file = tmp_path / "00001.safetensors"
    file.write_bytes(DAMAGES[how](file.read_bytes()))
    with pytest.raises(ValueError, match="00001.safetensors: damaged .*delete it"):
        case("layers").run(tmp_path)
    if how == "empty":
        file.unlink()
        got, groups = case("layers").run(tmp_path)
        assert [group.plan.name for i, group in enumerate(groups) if i not in (0, 2)] == RAN
        assert_same(got, whole("layers")[0])


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_record_is_there_whole_or_not_at_all(moment, tmp_path, monkeypatch):
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(resume.os, moment, die)
        with pytest.raises(KeyboardInterrupt):
            case("layers").run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["00000.part"]
    assert_same(case("layers").run(tmp_path)[0], whole("layers")[0])
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors"}


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(resume.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        case("layers").run(tmp_path)


def changing(what: str) -> Step:
    def apply(group: Group) -> Group:
        if what == "spec":
            return replace(group, spec=replace(group.spec, weights=None))
        return group.noted(finding=object())

    return jaxq.chain(RECIPE, Step(lambda _, spec: spec, apply))


@pytest.mark.parametrize(
    ("what", "message"), [("spec", "a step changed the group's `spec`"), ("log", "log/finding: builtins.object")]
)
def test_what_has_no_record_is_an_error(what, message, tmp_path):
    with pytest.raises(ValueError, match=f"layers/0/attn/q/kernel.*{message}"):
        replace(case("layers"), recipe=changing(what)).run(tmp_path)
    assert not list(tmp_path.iterdir())
