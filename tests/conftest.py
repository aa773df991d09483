"""The whole suite runs with the strictest JAX: numbers of unlike rank or type never meet unasked."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the suite's time is compilation: what one test or process has compiled, the others read.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
from hypothesis import HealthCheck, settings

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example of a property compiles, the others do not: a deadline for each would only measure XLA.
usual = settings(
    deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow], max_examples=20
)
settings.register_profile("jaxq", usual)
settings.register_profile("thorough", usual, max_examples=200)
settings.load_profile("jaxq")


def pytest_collection_finish() -> None:
    """What the imports made stays: no collection of garbage has to look through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
