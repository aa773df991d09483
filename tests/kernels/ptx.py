"""Runs a compiled kernel of Mosaic GPU without a GPU: its PTX, instruction by instruction, in numpy.

Written against NVIDIA's PTX ISA 9.0, not against JAX: the fragments' layouts, shared memory's swizzle, the matrix
descriptors and barriers are as that document has them. What it leaves out is time: copies and matrix products are done
as soon as they are issued, so that an absent wait is not found; an absent arrival is (nothing can go on).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from tests.kernels.ptx_memory import BUFFER, MAPS, PEER, Barrier, Block, Rows, Tiled, swizzled

LANES = 128  # threads of a warpgroup, worked on at once
THREAD = np.arange(LANES)
T, Q, WARP = THREAD % 4, THREAD // 4 % 8, THREAD // 32
TYPES = {
    "u16": np.uint16,
    "s16": np.int16,
    "u32": np.uint32,
    "s32": np.int32,
    "b32": np.uint32,
    "u64": np.uint64,
    "s64": np.int64,
    "b64": np.uint64,
}
BINARY: dict[str, Callable] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add}
BINARY |= {"sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
COMPARED: dict[str, Callable] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARED |= {"gt": np.greater, "ge": np.greater_equal}
FLOATS = ("f32", "bf16x2")
FLOATING: dict[str, Callable] = BINARY | {"fma": lambda a, b, c: a * b + c, "neg": np.negative, "div": np.divide}
FLOATING |= {"rcp": np.reciprocal}
NOTHING = (
    "prefetch",
    "fence",
    "barrier.cluster.arrive",
    "cp.async.bulk.wait",
    "setmaxnreg",
    "wgmma.fence",
    "wgmma.commit",
    "wgmma.wait",
    "cp.async.bulk.commit",
)


def run(
    ptx: str,
    grid: tuple[int, int, int],
    warpgroups: int,
    maps: list[Tiled | Rows],
    buffers: list[np.ndarray],
    cluster: int = 1,
) -> None:
    """Runs a kernel of which the parameters are `buffers`, then `maps`; results are in the buffers and in the maps'
    matrices afterwards. `cluster` successive blocks of the grid's first axis share theirs."""
    program, labels = parsed(ptx)
    for z, y, x in np.ndindex(grid[2], grid[1], grid[0] // cluster):
        blocks: list[Block] = []
        blocks += [Block(maps, buffers, cluster=blocks) for _ in range(cluster)]
        groups = {
            (rank, i): Warpgroup(program, labels, block, i, (x * cluster + rank, y, z), rank).run()
            for rank, block in enumerate(blocks)
            for i in range(warpgroups)
        }
        at = dict.fromkeys(groups, "")
        while at:
            before = block_state(blocks), dict(at)
            for held in [at, *({k: w for k, w in at.items() if k[0] == rank} for rank in range(cluster))]:
                kind = "cluster" if held is at and cluster > 1 else "bar"
                if held and all(where.startswith(kind) for where in held.values()):
                    at |= dict.fromkeys(held, "")
            for i, where in list(at.items()):
                at[i] = where if where.startswith(("bar", "cluster")) else next(groups[i], "end")
            at = {i: where for i, where in at.items() if where != "end"}
            assert (block_state(blocks), at) != before, f"nothing can go on: {at}"


def block_state(blocks: list[Block]) -> list:
    return [(b.pending, b.bytes, b.phase) for block in blocks for b in block.barriers.values()]


def parsed(ptx: str) -> tuple[list[tuple[str | None, str, list[str]]], dict[str, int]]:
    """(predicate, instruction, operands), and where the labels are. Names inside braces are local."""
    program: list[tuple[str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    text = ptx[ptx.index("$L__func_begin0:") : ptx.index("$L__func_end0:")]
    text = "\n".join(line.split("//")[0] for line in text.splitlines() if not line.strip().startswith(".loc"))
    depth, count = 0, 0

    def local(name: str) -> str:
        return f"{name}@{count}" if depth and not name.startswith(("%", "$")) else name

    for line in text.splitlines():
        line = line.strip()
        if line.startswith("{"):
            depth, count, line = depth + 1, count + 1, line[1:]
        closes = line.endswith("}") and not line.endswith("};")
        for part in filter(None, map(str.strip, line[: -1 if closes else None].split(";"))):
            if label := re.fullmatch(r"([\w$]+):", part):
                labels[local(label[1])] = len(program)
            elif not part.startswith((".reg", ".shared")):
                program.append(instruction(part, local))
        depth -= closes
    return program, labels


def instruction(text: str, local: Callable[[str], str]) -> tuple[str | None, str, list[str]]:
    found = re.fullmatch(r"(?:@(!?[%\w]+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
    assert found, text
    predicate, name, operands = found.groups()
    pattern = r"[%\w$]+" if name.startswith("cp.async.bulk.tensor") else r"\[[^\]]*\]|\{[^}]*\}|[^,\s]+"
    split = [local(op) if re.fullmatch(r"[A-Zp]\w*", op) else op for op in re.findall(pattern, operands)]
    return predicate and local(predicate), name, split


class Warpgroup:
    def __init__(self, program: list, labels: dict, block: Block, index: int, at: tuple[int, int, int], rank: int):
        self.program, self.labels, self.block = program, labels, block
        self.values: dict[str, np.ndarray] = {"%tid.x": (THREAD + index * LANES).astype(np.uint32)}
        self.values |= {f"%ctaid.{axis}": np.full(LANES, i, np.uint32) for axis, i in zip("xyz", at)}
        self.values |= {f"%cluster_ctaid.{axis}": np.full(LANES, i, np.uint32) for axis, i in zip("xyz", (rank, 0, 0))}
        self.values |= {f"%cluster_nctaid.{axis}": np.full(LANES, 1, np.uint32) for axis in "yz"}
        self.values["%cluster_nctaid.x"] = np.full(LANES, len(block.cluster), np.uint32)

    def run(self) -> Iterator[str]:
        """Until the end; what it waits for on the way."""
        at = 0
        while at < len(self.program):
            predicate, name, ops = self.program[at]
            active = np.ones(LANES, bool)
            if predicate:
                active = self.values[predicate.lstrip("!")] ^ predicate.startswith("!")
            at += 1
            if name.startswith("bra"):
                assert active.all() or not active.any(), "warpgroups branch together"
                at = self.labels[ops[0]] if active.any() else at
            elif name == "ret":
                return
            elif name == "bar.sync":
                if len(ops) == 1:
                    yield f"bar {at}"
            elif name.startswith("barrier.cluster.wait"):
                yield f"cluster {at}"
            elif name.startswith("mbarrier.try_wait"):
                barrier = self.block.barriers[self.address(ops[1])]
                while barrier.phase % 2 == int(self.get(ops[2], np.uint32)[0]):
                    yield f"wait {ops[1]}"
                self.values[ops[0]] = np.ones(LANES, bool)
            else:
                self.step(name, ops, active)

    def get(self, op: str, kind: Any) -> np.ndarray:
        if op in self.values:
            found = self.values[op]
            return found if found.dtype == bool or found.dtype.itemsize != np.dtype(kind).itemsize else found.view(kind)
        if op.startswith("0f"):
            return np.full(LANES, int(op[2:], 16), np.uint32).view(kind)
        if "dynamic_shmem" in op:
            return np.zeros(LANES, kind)
        bits = 8 * np.dtype(kind).itemsize
        number = MAPS if "param_" in op else int(op) % 2**bits
        return np.full(LANES, number, f"u{bits // 8}").view(kind)

    def addresses(self, op: str) -> np.ndarray:
        base, _, offset = op.strip("[] ").partition("+")
        found = self.get(base, np.uint64).astype(np.uint64)
        return found + np.uint64(int(offset or 0))

    def address(self, op: str) -> int:
        found = self.addresses(op)
        assert (found == found[0]).all()
        return int(found[0])

    def step(self, name: str, ops: list[str], active: np.ndarray) -> None:
        kind, parts = TYPES.get(name.split(".")[-1], np.uint32), name.split(".")
        if name.startswith("elect"):
            self.values[ops[0].split("|")[1]] = THREAD % 32 == 0
        elif name.startswith(NOTHING):
            pass
        elif name.startswith("wgmma.mma_async"):
            self.multiply(name, ops)
        elif name.startswith("mma.sync"):
            self.multiply_by_warps(name, ops)
        elif name.startswith("ldmatrix"):
            self.load_matrices(name, ops)
        elif re.match(r"cp\.async\.bulk\.tensor\.[234]d\.shared", name):
            self.copy(ops, active)
        elif re.match(r"cp\.async\.bulk\.tensor\.[234]d\.global", name):
            self.store(ops, active)
        elif parts[0] == "mapa":
            rank = self.get(ops[2], np.uint32).astype(np.uint64)
            self.values[ops[0]] = self.get(ops[1], np.uint64) + np.uint64(PEER) * (rank + np.uint64(1))
        elif name.startswith("st.async"):
            self.move(parts, ops[:2], active)
            block, at = self.block.of(self.address(ops[2]))
            block.barriers[at].move(expected=-int(active.sum()) * int(parts[-1][1:]) // 8)
        elif name.startswith("mbarrier"):
            self.barrier(name, ops, active)
        elif parts[0] in ("ld", "st"):
            self.move(parts, ops, active)
        elif parts[0] == "shfl":
            lane = THREAD ^ int(ops[2]) if parts[2] == "bfly" else THREAD // 32 * 32
            self.values[ops[0]] = self.get(ops[1], np.uint32)[lane]
        elif parts[0] == "setp":
            a, b = (self.floats(op, "f32") if parts[-1] == "f32" else self.get(op, kind) for op in ops[1:])
            self.values[ops[0]] = COMPARED[parts[1]](a, b)
        elif parts[0] in ("mov", "cvta"):
            self.values[ops[0]] = self.pair(ops[1]) if ops[1].startswith("{") else self.get(ops[1], kind)
        elif parts[0] == "cvt" and "bf16" in name:
            self.values[ops[0]] = self.converted(name, ops)
        elif parts[0] == "cvt":
            self.values[ops[0]] = self.get(ops[1], TYPES[parts[2]]).astype(TYPES[parts[1]])
        elif parts[0] == "selp":
            self.values[ops[0]] = np.where(self.values[ops[3]], self.get(ops[1], kind), self.get(ops[2], kind))
        else:
            self.values[ops[0]] = self.computed(parts, ops, kind)

    def computed(self, parts: list[str], ops: list[str], kind: Any) -> np.ndarray:
        last = parts[-1]
        if last == "pred":
            return BINARY[parts[0]](self.values[ops[1]], self.values[ops[2]])
        if last in FLOATS:
            return rounded(FLOATING[parts[0]](*(self.floats(op, last) for op in ops[1:])), last)
        if parts[0] == "prmt":
            a, b, chosen = (self.get(op, np.uint32) for op in ops[1:])
            both = np.stack([a, b], 1).view(np.uint8)
            picks = [(chosen >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]
            assert all((p < 8).all() for p in picks)
            return np.stack([both[THREAD, p] for p in picks], 1).view(np.uint32)[:, 0]
        if parts[0] == "bfe":
            mask = (1 << int(ops[3])) - 1
            return (self.get(ops[1], kind) >> kind(int(ops[2]))) & kind(mask)
        if parts[0] in ("shl", "shr"):
            a, by = self.get(ops[1], kind), self.get(ops[2], np.uint32).astype(kind)
            assert (by < 8 * np.dtype(kind).itemsize).all()
            return a << by if parts[0] == "shl" else a >> by
        if "hi" in parts:
            a, b = (self.get(op, kind).astype(np.int64 if kind is np.int32 else np.uint64) for op in ops[1:])
            return (a * b >> a.dtype.type(8 * np.dtype(kind).itemsize)).astype(kind)
        if "wide" in parts:
            wide = {np.int32: np.int64, np.uint32: np.uint64}[kind]
            return self.get(ops[1], kind).astype(wide) * self.get(ops[2], kind).astype(wide)
        if parts[0] == "shf":
            low, high, by = (self.get(op, np.uint32).astype(np.uint64) for op in ops[1:])
            both = high << np.uint64(32) | low
            return (both >> by if parts[1] == "r" else both << by >> np.uint64(32)).astype(np.uint32)
        if parts[0] == "mad":
            a, b, c = (self.get(op, kind) for op in ops[1:])
            return a * b + c
        if parts[0] == "not":
            return ~self.get(ops[1], kind)
        return BINARY[parts[0]](self.get(ops[1], kind), self.get(ops[2], kind))

    def pair(self, op: str) -> np.ndarray:
        """Two registers of 16 bits as one of 32."""
        low, high = (self.get(name, np.uint16).astype(np.uint32) for name in re.findall(r"[%\w]+", op))
        return high << np.uint32(16) | low

    def converted(self, name: str, ops: list[str]) -> np.ndarray:
        if name == "cvt.f32.bf16":
            return self.get(ops[1], np.uint16).astype(np.uint32) << np.uint32(16)
        found = [self.floats(op, "f32").astype(ml_dtypes.bfloat16).view(np.uint16) for op in ops[:0:-1]]
        return found[0] if len(found) == 1 else found[1].astype(np.uint32) << np.uint32(16) | found[0]

    def floats(self, op: str, kind: str) -> np.ndarray:
        """float64 [128] or, of pairs of bfloat16, [128, 2]."""
        held = np.ascontiguousarray(self.get(op, np.uint32))
        return (held.view(np.float32) if kind == "f32" else bfloat16(held)).astype(float)

    def barrier(self, name: str, ops: list[str], active: np.ndarray) -> None:
        if not active.any():
            return
        block, at = self.block.of(self.address(ops[0] if ".init" in name else ops[1]))
        if ".init" in name:
            count = int(self.get(ops[1], np.uint32)[0])
            block.barriers[at] = Barrier(count, count)
            return
        each = int(self.get(ops[2], np.uint32)[0])
        if "expect_tx" in name:
            return block.barriers[at].move(int(active.sum()), each * int(active.sum()))
        block.barriers[at].move(each * int(active.sum()))

    def copy(self, ops: list[str], active: np.ndarray) -> None:
        """A box into shared memory; of tiles in rows of 128 bytes, whose eight parts of 16 are swizzled by the row."""
        if not active.any():
            return
        assert active.sum() == 1
        (thread,) = np.flatnonzero(active)
        to, tensor, *at, barrier = (int(self.get(op, np.uint64)[thread]) for op in ops)
        shown = self.block.maps[(tensor - MAPS) // 128]
        box = shown.copy(at[::-1])
        where = to + np.arange(box.size)
        self.block.shared[swizzled(where) if isinstance(shown, Tiled) else where] = box.ravel()
        self.block.barriers[barrier].move(expected=-box.size)

    def store(self, ops: list[str], active: np.ndarray) -> None:
        """A box from shared memory, the other way round."""
        if not active.any():
            return
        (thread,) = np.flatnonzero(active)
        tensor, *at, source = (int(self.get(op, np.uint64)[thread]) for op in ops)
        shown = self.block.maps[(tensor - MAPS) // 128]
        assert isinstance(shown, Tiled)
        where = source + np.arange(1024 * shown.box[0] * shown.box[1])
        shown.store(at[::-1], self.block.shared[swizzled(where)])

    def move(self, parts: list[str], ops: list[str], active: np.ndarray) -> None:
        if parts[1].startswith("param"):
            self.values[ops[0]] = np.full(LANES, BUFFER * (1 + int(ops[1].strip("[]").split("_")[-1])), np.uint64)
            return
        store = parts[0] == "st"
        where, held = (ops[0], ops[1]) if store else (ops[1], ops[0])
        names, bits = re.findall(r"[%\w]+", held), int(parts[-1][1:])
        memory, at = self.block.bytes_at(self.addresses(where), len(names) * bits // 8)
        if store:
            words = np.stack([self.get(n, TYPES[f"b{bits}"]) for n in names], 1)
            memory[at[active]] = words.view(np.uint8)[active]
            return
        words = memory[at].view(TYPES[f"b{bits}"])
        self.values |= {n: words[:, i].copy() for i, n in enumerate(names)}

    def multiply(self, name: str, ops: list[str]) -> None:
        """D [64, n] += A [64, 16] of registers times B [16, n] of shared memory, K contiguous there."""
        found = re.search(r"\.m64n(\d+)k16\.f32\.bf16\.bf16", name)
        sums, a, descriptor, _, *signs = ops
        assert found and signs == ["1", "1", "0"], "neither negated nor transposed"
        n, names = int(found[1]), re.findall(r"%r\d+", sums)
        left = np.zeros((64, 16))
        for i, register in enumerate(re.findall(r"%r\d+", a)):
            row, k = 16 * WARP + Q + 8 * (i % 2), 2 * T + 8 * (i // 2)
            left[row[:, None], k[:, None] + [0, 1]] = self.floats(register, "bf16x2")
        given = int(self.get(descriptor, np.uint64)[0])
        assert given >> 62 == 1, "a swizzle of 128 bytes"
        start, stride = (given & 0x3FFF) << 4, (given >> 32 & 0x3FFF) << 4
        columns = np.arange(n)[:, None]
        at = swizzled(start + columns // 8 * stride + columns % 8 * 128 + np.arange(32))
        right = bfloat16(self.block.shared[at].view(np.uint32)).reshape(n, 16).astype(float)
        total = left @ right.T
        for i, register in enumerate(names):
            row, column = 16 * WARP + Q + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * T + i % 2
            self.values[register] = rounded(self.floats(register, "f32") + total[row, column], "f32")

    def multiply_by_warps(self, name: str, ops: list[str]) -> None:
        """D [16, 8] = A [16, 16] B [16, 8] + C of each warp, all of registers."""
        assert name.endswith(".m16n8k16.row.col.f32.bf16.bf16.f32")
        to, a, b, c = (re.findall(r"[%\w]+", op) for op in ops)
        left, right, total = np.zeros((4, 16, 16)), np.zeros((4, 8, 16)), np.zeros((4, 16, 8))
        pair = np.arange(2)
        for i, register in enumerate(a):
            row, k = Q + 8 * (i % 2), 2 * T + 8 * (i // 2)
            left[WARP[:, None], row[:, None], k[:, None] + pair] = self.floats(register, "bf16x2")
        for i, register in enumerate(b):
            right[WARP[:, None], Q[:, None], 2 * T[:, None] + 8 * i + pair] = self.floats(register, "bf16x2")
        for i, register in enumerate(c):
            total[WARP, Q + 8 * (i // 2), 2 * T + i % 2] = self.floats(register, "f32")
        total += left @ right.swapaxes(1, 2)
        self.values |= {r: rounded(total[WARP, Q + 8 * (i // 2), 2 * T + i % 2], "f32") for i, r in enumerate(to)}

    def load_matrices(self, name: str, ops: list[str]) -> None:
        """Matrices of 8 rows of 16 bytes, whose addresses are the lanes': eight lanes' for each matrix."""
        to, where = re.findall(r"[%\w]+", ops[0]), self.addresses(ops[1])
        assert name == f"ldmatrix.sync.aligned.m8n8.x{len(to)}.shared.b16"
        for i, register in enumerate(to):
            rows = where[32 * WARP + 8 * i + Q] + 4 * T.astype(np.uint64)
            memory, at = self.block.bytes_at(rows, 4)
            self.values[register] = memory[at].view(np.uint32)[:, 0]


def bfloat16(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(ml_dtypes.bfloat16).reshape(*words.shape, 2)


def rounded(numbers: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f32":
        return numbers.astype(np.float32).view(np.uint32)
    significand, exponent = np.frexp(numbers)  # once from float64: not to float32 first
    numbers = np.ldexp(np.rint(significand * 256), exponent - 8).astype(np.float32)
    return np.ascontiguousarray(numbers.astype(ml_dtypes.bfloat16)).view(np.uint32).reshape(LANES)
