"""Runs a compiled kernel of Mosaic GPU without a GPU: its PTX, instruction by instruction, in numpy.

Written against NVIDIA's PTX ISA 9.0, not against JAX: the fragments' layouts, shared memory's swizzle, the matrix
descriptors and barriers are as that document has them. What goes on beside a warpgroup is
done as late as possible: copies into shared memory when nothing else can go on, though what was there before is lost at
once, and the products of a warpgroup when it waits for them. So an absent wait or arrival is found. What registers the
machine has for those of PTX is another matter: `sass`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.kernels.ptx_matrix import (
    LANES,
    THREAD,
    bfloat16,
    converted,
    load_matrices,
    multiply,
    multiply_by_warps,
    pair,
    rounded,
)
from tests.kernels.ptx_memory import BUFFER, MAPS, PEER, Barrier, Block, Rows, Tiled, swizzled
from tests.kernels.ptx_text import parsed

TYPES = {
    f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}").type
    for kind in "usb"
    for bits in (8, 16, 32, 64)
}
BINARY: dict[str, Callable] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add}
BINARY |= {"sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}
COMPARED: dict[str, Callable] = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARED |= {"gt": np.greater, "ge": np.greater_equal}
FLOATS = ("f32", "bf16x2")
FLOATING: dict[str, Callable] = BINARY | {"fma": lambda a, b, c: a * b + c, "neg": np.negative, "div": np.divide}
FLOATING |= {"rcp": np.reciprocal}
NOTHING = ("prefetch", "fence", "setmaxnreg", "wgmma.fence", "barrier.cluster.arrive")
NOTHING += ("cp.async.bulk.wait", "cp.async.bulk.commit")


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
            if (block_state(blocks), at) == before:
                assert sum(block.land() for block in blocks), f"nothing can go on: {at}"


def block_state(blocks: list[Block]) -> list:
    return [(b.pending, b.bytes, b.phase) for block in blocks for b in block.barriers.values()]


class Warpgroup:
    def __init__(self, program: list, labels: dict, block: Block, index: int, at: tuple[int, int, int], rank: int):
        self.program, self.labels, self.block = program, labels, block
        self.products: list[list[tuple[str, list[str]]]] = [[]]  # under way, by groups; the last is not committed
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
                assert self.products == [[]], "a product is not waited for"
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

    def wait(self, left: int) -> None:
        """Until so many groups of products are under way."""
        done = len(self.products) - 1 - left
        for name, ops in [product for group in self.products[: max(done, 0)] for product in group]:
            multiply(self, name, ops)
        self.products = self.products[max(done, 0) :]

    def get(self, op: str, kind: Any) -> np.ndarray:
        if op in self.values:
            found = self.values[op]
            return found if found.dtype == bool or found.dtype.itemsize != np.dtype(kind).itemsize else found.view(kind)
        if op.startswith("0f"):
            return np.full(LANES, int(op[2:], 16), np.uint32).view(kind)
        if "dynamic_shmem" in op:
            return np.zeros(LANES, kind)
        bits = 8 * np.dtype(kind).itemsize
        number = MAPS if "param_" in op else int(op.rstrip("U"), 0) % 2**bits
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
            self.products[-1].append((name, ops))
        elif name.startswith("wgmma.commit"):
            self.products.append([])
        elif name.startswith("wgmma.wait"):
            self.wait(int(ops[0]))
        elif name.startswith("mma.sync"):
            multiply_by_warps(self, name, ops)
        elif name.startswith("ldmatrix"):
            load_matrices(self, name, ops)
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
            if ops[1].startswith("{"):
                self.values[ops[0]] = pair(self, ops[1])
            elif ops[0].startswith("{"):
                halves = np.ascontiguousarray(self.get(ops[1], np.uint32)).view(np.uint16).reshape(LANES, 2)
                self.values |= dict(zip(ops[0].strip("{ }").split(", "), halves.T))
            else:
                found = self.get(ops[1], kind)
                self.values[ops[0]] = found != 0 if parts[1] == "pred" else found
        elif parts[0] == "cvt" and "f16" in name:
            self.values[ops[0]] = converted(self, name, ops)
        elif name.startswith("cvt.rn.f32."):
            self.values[ops[0]] = rounded(self.get(ops[1], TYPES[parts[3]]).astype(float), "f32")
        elif parts[0] == "cvt":
            self.values[ops[0]] = self.get(ops[1], TYPES[parts[2]]).astype(TYPES[parts[2]]).astype(TYPES[parts[1]])
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
        if last == "s16x2":
            a, b = (np.ascontiguousarray(self.get(op, np.uint32)).view(np.uint16) for op in ops[1:])
            return BINARY[parts[0]](a, b).view(np.uint32)
        if parts[0] == "prmt":
            a, b, chosen = (self.get(op, np.uint32) for op in ops[1:])
            both = np.stack([a, b], 1).view(np.uint8)
            picks = [(chosen >> np.uint32(4 * i)) & np.uint32(15) for i in range(4)]
            picked = [(both[THREAD, p % 8].view(np.int8), p >= 8) for p in picks]
            bytes_ = [np.where(sign, byte >> 7, byte) for byte, sign in picked]
            return np.stack(bytes_, 1).view(np.uint32)[:, 0]
        if parts[0] == "lop3":
            a, b, c, table = (self.get(op, np.uint32) for op in ops[1:])
            terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8)]
            return np.bitwise_or.reduce([np.where(table >> np.uint32(i) & 1, term, 0) for i, term in enumerate(terms)])
        if parts[0] == "bfe":
            bits, first, count = 8 * np.dtype(kind).itemsize, int(ops[2]), int(ops[3])
            return self.get(ops[1], kind) << kind(bits - first - count) >> kind(bits - count)  # with its sign, if any
        if parts[0] in ("shl", "shr"):
            a, by = self.get(ops[1], kind), self.get(ops[2], np.uint32).astype(kind)
            assert (by < 8 * np.dtype(kind).itemsize).all()
            return a << by if parts[0] == "shl" else a >> by
        if "wide" in parts or "hi" in parts:
            whole, bits = self.get(ops[1], kind).astype(object) * self.get(ops[2], kind), 8 * np.dtype(kind).itemsize
            return whole.astype(TYPES[f"{last[0]}{2 * bits}"]) if "wide" in parts else (whole >> bits).astype(kind)
        if parts[0] == "shf":
            low, high, by = (self.get(op, np.uint32).astype(np.uint64) for op in ops[1:])
            both = high << np.uint64(32) | low
            return (both >> by if parts[1] == "r" else both << by >> np.uint64(32)).astype(np.uint32)
        if parts[0] == "mad":
            a, b, c = (self.get(op, kind) for op in ops[1:])
            return a * b + c
        if parts[0] in ("not", "neg"):
            return (np.invert if parts[0] == "not" else np.negative)(self.get(ops[1], kind))
        return BINARY[parts[0]](self.get(ops[1], kind), self.get(ops[2], kind))

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
        self.block.copy(swizzled(where) if isinstance(shown, Tiled) else where, box.ravel(), barrier)

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
