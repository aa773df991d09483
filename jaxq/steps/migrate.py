"""The migrations that OS+ is compared with: other formulas for the scale, and no shift."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxq.steps.group import Group, Step, channel_range, transformed, weight_range
from jaxq.steps.shift import Where, foldable, touch

SMALLEST = 1e-5  # SmoothQuant's own floor for activation and weight ranges


def smooth_quant(alpha: float = 0.5, where: Where = foldable) -> Step:
    """SmoothQuant (arXiv:2211.10438, eq. 4): s_c = max |x_c|^alpha / max |W_c|^(1 - alpha).

    Args:
      alpha: how much of the difficulty goes from the activation to the weights, from 0 to 1.
      where: which groups, by what is known of them.

    Raises:
      ValueError: alpha is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"smooth_quant: alpha is {alpha}; it must lie between 0 and 1")

    def apply(group: Group) -> Group:
        if not where(group.plan) or not group.can_scale():
            return group
        low, high = channel_range(group)
        x = jnp.maximum(jnp.maximum(high, -low), SMALLEST)
        w = jnp.maximum(weight_range(group), SMALLEST)
        return transformed(group, scale=jnp.maximum(x**alpha / w ** (1 - alpha), SMALLEST))

    return Step(touch(where), apply)


def gamma_migration() -> Step:
    """The first Outlier Suppression (arXiv:2209.13325, eq. 4-5): the norm's scale gamma, which carries the outliers,
    goes into the weights; groups that a norm with a scale does not feed are left alone."""

    def apply(group: Group) -> Group:
        gamma = group.norm_scale
        if gamma is None or not group.can_scale():
            return group
        return transformed(group, scale=_without_zeros(gamma))

    return Step(touch(foldable), apply)


def _without_zeros(gamma: jax.Array) -> jax.Array:
    """A channel whose gamma is 0 carries only its bias and stays as it is."""
    return jnp.where(jnp.abs(gamma) < SMALLEST, jnp.ones_like(gamma), gamma)
