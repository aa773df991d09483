"""The whole suite runs with the strictest JAX: numbers of unlike rank or type never meet unasked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example of a property compiles, the others do not: a deadline for each would only measure XLA.
settings.register_profile(
    "jaxq", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("jaxq")
