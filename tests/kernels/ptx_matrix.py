"""The matrix instructions of a kernel that `ptx` runs, and its numbers of 16 bits.

Written, as `ptx`, against NVIDIA's PTX ISA 9.0.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np

from tests.kernels.ptx_memory import swizzled

LANES = 128  # threads of a warpgroup, worked on at once
THREAD = np.arange(LANES)
T, Q, WARP = THREAD % 4, THREAD // 4 % 8, THREAD // 32


def multiply(group: Any, name: str, ops: list[str]) -> None:
    """D [64, n] += A [64, 32 bytes] of registers times B [32 bytes, n] of shared memory, K contiguous there."""
    found = re.search(r"\.m64n(\d+)k(?:16\.(f32)\.bf16\.bf16|32\.(s32)\.s8\.s8)", name)
    sums, a, descriptor, _, *signs = ops
    assert found and signs in (["1", "1", "0"], []), "neither negated nor transposed"
    n, kind, names = int(found[1]), found[2] or found[3], re.findall(r"%r\d+", sums)
    left = np.zeros((64, 32), np.uint8)
    for i, register in enumerate(re.findall(r"%r\d+", a)):
        row, k = 16 * WARP + Q + 8 * (i % 2), 4 * T + 16 * (i // 2)
        left[row[:, None], k[:, None] + np.arange(4)] = group.get(register, np.uint32)[:, None].view(np.uint8)
    given = int(group.get(descriptor, np.uint64)[0])
    assert given >> 62 == 1, "a swizzle of 128 bytes"
    start, stride = (given & 0x3FFF) << 4, (given >> 32 & 0x3FFF) << 4
    columns = np.arange(n)[:, None]
    at = swizzled(start + columns // 8 * stride + columns % 8 * 128 + np.arange(32))
    held = ml_dtypes.bfloat16 if kind == "f32" else np.int8
    total = left.view(held).astype(float) @ group.block.shared[at].view(held).astype(float).T
    for i, register in enumerate(names):
        row, column = 16 * WARP + Q + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * T + i % 2
        if kind == "f32":
            group.values[register] = rounded(group.floats(register, "f32") + total[row, column], "f32")
        else:
            group.values[register] = group.get(register, np.int32) + total[row, column].astype(np.int32)


def multiply_by_warps(group: Any, name: str, ops: list[str]) -> None:
    """D [16, 8] = A [16, 16] B [16, 8] + C of each warp, all of registers."""
    assert name.endswith(".m16n8k16.row.col.f32.bf16.bf16.f32")
    to, a, b, c = (re.findall(r"[%\w]+", op) for op in ops)
    left, right, total = np.zeros((4, 16, 16)), np.zeros((4, 8, 16)), np.zeros((4, 16, 8))
    pair = np.arange(2)
    for i, register in enumerate(a):
        row, k = Q + 8 * (i % 2), 2 * T + 8 * (i // 2)
        left[WARP[:, None], row[:, None], k[:, None] + pair] = group.floats(register, "bf16x2")
    for i, register in enumerate(b):
        right[WARP[:, None], Q[:, None], 2 * T[:, None] + 8 * i + pair] = group.floats(register, "bf16x2")
    for i, register in enumerate(c):
        total[WARP, Q + 8 * (i // 2), 2 * T + i % 2] = group.floats(register, "f32")
    total += left @ right.swapaxes(1, 2)
    group.values |= {r: rounded(total[WARP, Q + 8 * (i // 2), 2 * T + i % 2], "f32") for i, r in enumerate(to)}


def load_matrices(group: Any, name: str, ops: list[str]) -> None:
    """Matrices of 8 rows of 16 bytes, whose addresses are the lanes': eight lanes' for each matrix. Transposed, of
    numbers of 16 bits."""
    to, where = re.findall(r"[%\w]+", ops[0]), group.addresses(ops[1])
    turned = name == f"ldmatrix.sync.aligned.m8n8.x{len(to)}.trans.shared.b16"
    assert turned or name == f"ldmatrix.sync.aligned.m8n8.x{len(to)}.shared.b16"
    for i, register in enumerate(to):
        lane = 32 * WARP + 8 * i
        rows, columns = (2 * T, Q) if turned else (Q, 2 * T)
        found = np.zeros((LANES, 2), np.uint16)
        for j in range(2):
            row, column = (rows + j, columns) if turned else (rows, columns + j)
            memory, at = group.block.bytes_at(where[lane + row] + 2 * column.astype(np.uint64), 2)
            found[:, j] = memory[at].view(np.uint16)[:, 0]
        group.values[register] = found.view(np.uint32)[:, 0]


def pair(group: Any, op: str) -> np.ndarray:
    """Two registers of 16 bits as one of 32."""
    low, high = (group.get(name, np.uint16).astype(np.uint32) for name in re.findall(r"[%\w]+", op))
    return high << np.uint32(16) | low


def converted(group: Any, name: str, ops: list[str]) -> np.ndarray:
    """To or from numbers of 16 bits; of two float32 the first is the upper half."""
    if name.startswith("cvt.f32."):
        half = ml_dtypes.bfloat16 if name.endswith("bf16") else np.float16
        return group.get(ops[1], np.uint16).view(half).astype(np.float32).view(np.uint32)
    if name == "cvt.rn.f16x2.e4m3x2":
        both = np.ascontiguousarray(group.get(ops[1], np.uint16)).view(ml_dtypes.float8_e4m3fn)
        return both.astype(np.float16).view(np.uint32)
    found = [group.floats(op, "f32").astype(ml_dtypes.bfloat16).view(np.uint16) for op in ops[:0:-1]]
    return found[0] if len(found) == 1 else found[1].astype(np.uint32) << np.uint32(16) | found[0]


def bfloat16(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(ml_dtypes.bfloat16).reshape(*words.shape, 2)


def rounded(numbers: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f32":
        return numbers.astype(np.float32).view(np.uint32)
    significand, exponent = np.frexp(numbers)  # once from float64: not to float32 first
    numbers = np.ldexp(np.rint(significand * 256), exponent - 8).astype(np.float32)
    return np.ascontiguousarray(numbers.astype(ml_dtypes.bfloat16)).view(np.uint32).reshape(LANES)
