"""The kernels compiled for TPUs, ahead of time: no temporary, the wanted instructions, few instruction bundles."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.kernels.ahead import rows_of

pytestmark = pytest.mark.skipif(
    find_spec("libtpu") is None, reason="the TPU's compiler is not installed: pip install 'jaxq[tpu-aot]'"
)
PUSHED = {  # what the matrix units hold: the weights' carriers
    "w4a8": {"v5e": "s8", "v6e": "s8", "v7x": "bf16"},  # v7x multiplies no int8: it converts
    "int4": {"v5e": "f8e4m3b11.bf16", "v6e": "f8e4m3b11.bf16", "v7x": "f8e4m3"},
    "float": {"v5e": "bf8.bf16", "v6e": "bf8.bf16", "v7x": "f8e5m2"},
    "e2m1_a4": {"v5e": "bf8.bf16", "v6e": "bf8.bf16", "v7x": "f8e4m3"},
    "w8a8": {"v5e": "s8", "v6e": "s8", "v7x": "bf16"},
    "w8a16": {"v5e": "bf16", "v6e": "bf16", "v7x": "bf16"},  # an int8's seven digits are no float's of 8 bits
    "decoded": {"v5e": "bf16", "v6e": "bf16", "v7x": "bf16"},
    "fp8": {"v5e": "f8e4m3b11.bf16", "v6e": "f8e4m3b11.bf16", "v7x": "f8e4m3"},
}


def check(row: dict) -> None:
    name, target = row["kernel"], row["target"]
    assert row["temporary"] == 0
    assert row["bundles"] <= slack(name, target, row["rows"]) * row["floor"], row
    pushed = PUSHED[next(kind for kind in (name, name.split("_")[0], "float") if kind in PUSHED)][target]
    assert {key for key in row["instructions"] if key.startswith("vmatpush")} == {f"vmatpush.{pushed}"}, row


def slack(name: str, target: str, rows: int) -> float:
    """How many bundles a step may take for each cycle of its floor.

    Decoding tokens a step is to wait for memory, not memory for it, except on v7x, whose memory is faster than its
    vector unit decodes. With many rows the scales of groups of 128 cost a pass over the result each, and smaller groups
    several with few; of 8 bits, whose weights take longer to read, they cost less of a step. Where weights are decoded
    first, that costs few rows more than the product, and many rows little.
    """
    if name.startswith("decoded"):
        return 1.6 if rows > 16 else 4.0
    if name.endswith(("g32", "g16")):
        return 2.0 if name.startswith(("w8", "fp8")) else 4.0
    if rows > 16:
        return 4.2 if name.endswith("g128") else 1.45
    return 2.2 if target == "v7x" else 1.0


def test_one_kernel_compiles():
    (row,) = rows_of("tpu_compiled.py", "--targets", "v6e", "--kernels", "e2m1_a16", "--rows", "1")
    check(row)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_grids_that_are_bytes_stay_on_the_chip(target):
    """Decoding for few tokens writes nothing to memory, neither a weight nor its scales."""
    paths = ("mxfp4a16", "nvfp4a16", "w4a16_g128", "w4a8_g128_zero")
    rows = rows_of("compiled_paths.py", "--targets", target, "--rows", "16", "--paths", *paths)
    assert [row["path"] for row in rows] == [*paths]
    for row in rows:
        assert (row["by"], row["temporary"]) == ("Pallas", 0) and row["bytes"] <= 1.01, row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e", "v6e", "v7x"])
def test_all_kernels_compile(target):
    rows = rows_of("tpu_compiled.py", "--targets", target, "--rows", "16", "256")
    assert len(rows) == 45
    for row in rows:
        check(row)
