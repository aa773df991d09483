"""Fingerprints: equal for equal things, in every process; different where something counts."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxq
from jaxq.calibration.fingerprint import fingerprint
from jaxq.recipes import read_recipe, recipe_files
from jaxq.recipes.steps import to_step
from jaxq.steps import Group, Step


def scaled(by: float, name: str = "a") -> Step:
    def apply(group: Group) -> Group:
        return group.noted(**{name: jax.nn.relu(jnp.float32(by))})

    return Step(lambda _, spec: spec, jax.jit(apply))


class Holder:
    def __init__(self, value: object):
        self.value, self.me = value, self

    def method(self) -> object:
        return self.value


THINGS = [
    lambda: 1,
    lambda: 1.0,
    lambda: True,
    lambda: "1",
    lambda: None,
    lambda: np.float32(1),
    lambda: jnp.float32(1.5),
    lambda: np.zeros(4, np.int8),
    lambda: np.zeros((2, 2), np.int8),
    lambda: np.zeros(4, np.uint8),
    lambda: jnp.array([0.0, -0.0]),
    lambda: jnp.array([0.0, 0.0]),
    lambda: jnp.array([0.0, 0.0], jnp.bfloat16),
    lambda: jax.random.key(0),
    lambda: jax.random.key(1),
    lambda: [1, 2],
    lambda: (1, 2),
    lambda: {"a": 1, "b": 2},
    lambda: {"a": 2, "b": 1},
    lambda: {"x", "y", "z"},
    lambda: jaxq.Int(4),
    lambda: jaxq.Int(4, symmetric=False),
    lambda: partial(max, 1),
    lambda: partial(max, 2),
    lambda: scaled(1.0),
    lambda: scaled(2.0),
    lambda: scaled(1.0, "b"),
    lambda: Holder(1),
    lambda: Holder(2),
    lambda: Holder(1).method,
    lambda: Holder(2).method,
    lambda: jaxq.os_plus(),
    lambda: jaxq.smooth_quant(0.5),
    lambda: jaxq.smooth_quant(0.6),
    lambda: jaxq.skip(["a"], jaxq.quantize()),
    lambda: jaxq.skip(["b"], jaxq.quantize()),
    lambda: lambda x: x + 1,
    lambda: lambda x: x + 2,
]


def test_equal_things_and_no_others_have_one_fingerprint():
    found = [fingerprint(make()) for make in THINGS]
    assert found == [fingerprint(make()) for make in THINGS]
    assert len(set(found)) == len(THINGS)


def test_every_recipe_has_its_own():
    recipes = {name: to_step(read_recipe(name)) for name in recipe_files()}
    assert len(recipes) > 20
    assert len({fingerprint(step) for step in recipes.values()}) == len(recipes)


@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_process_finds_the_same(seed):
    code = "from tests.calibration.test_fingerprint import *; print(fingerprint([make() for make in THINGS]))"
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert found.stdout.strip() == fingerprint([make() for make in THINGS]), found.stderr
