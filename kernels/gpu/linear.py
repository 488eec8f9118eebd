"""linear on CUDA with one order of summation: the kernel of `duologue::linear` in exact mode, and its
launcher.

Why a row's bits do not depend on M: K is walked in ascending order in one loop by one program (no split-K),
fp32 accumulates, and rows past M are zeros. Tiles differ only in their rows and columns, which share no sum;
all are at least 64 rows high, so that Hopper multiplies them by the same instruction family (wgmma), in steps
of 16 along K. fp32 inputs are multiplied in fp32, without tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import MULTIPROCESSORS, capability, launch, multiprocessors
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FEW = 64  # rows of one tile
DECODE = 512  # rows, beyond which products are bound by the multiplying
CACHE = 5.5e12  # bytes per second out of an H100's L2 cache: microbenchmarks, chipsandcheese.com 2023
CACHE_ONE = 1.1e11  # to one multiprocessor, which gets 64 bytes a clock
RATE = 0.6 * 790e12 / MULTIPROCESSORS  # of products a second there: what loops without TMA make of cuBLAS's
HALF = 113 << 10  # bytes of an H100's shared memory, of which two programs have half each
TMA_CHIPS = (90, 100, 103)  # that have tensor descriptors, and the shared memory of `tma_tile`
TILES = (
    {"ROWS": 256, "COLUMNS": 128, "num_warps": 8, "num_stages": 3},
    {"ROWS": 256, "COLUMNS": 64, "num_warps": 8, "num_stages": 3},
    {"ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 3},
    {"ROWS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 4},
    {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 4},
    {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 6},
    {"ROWS": 64, "COLUMNS": 16, "num_warps": 4, "num_stages": 6},
)
LARGE = {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}  # beyond DECODE rows
Three = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _place(number, M, columns, ROWS: tl.constexpr):
    """(row tile, column tile) by number: eight row tiles in turn share a panel of the weight."""
    rows = tl.cdiv(M, ROWS)
    group = number // (8 * columns)
    place = number % (8 * columns)
    height = tl.minimum(rows - group * 8, 8)
    return group * 8 + place % height, place // height


@triton.jit
def _product(
    x,
    weight,
    bias,
    i,
    j,
    M,
    O,
    K,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Rows i and columns j of x [M, K] @ weight [O, K]^T + bias [O], in fp32."""
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        a = tl.load(x + i[:, None] * K + k[None, :], (i < M)[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(weight + j[None, :] * K + k[:, None], (j < O)[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + j, j < O, 0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _products(x, gate, up, i, j, M, O, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """`_product` of two weights, without bias: x is read once for both."""
    first = tl.zeros((ROWS, COLUMNS), tl.float32)
    second = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        a = tl.load(x + i[:, None] * K + k[None, :], (i < M)[:, None] & (k < K)[None, :], 0.0)
        at = j[None, :] * K + k[:, None]
        real = (j < O)[None, :] & (k < K)[:, None]
        first = tl.dot(a, tl.load(gate + at, real, 0.0), first, input_precision="ieee")
        second = tl.dot(a, tl.load(up + at, real, 0.0), second, input_precision="ieee")
    return first, second


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x,
    weight,
    bias,
    out,
    M,
    O,
    K,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of out [M, O]."""
    row, column = _place(tl.program_id(0), M, tl.cdiv(O, COLUMNS), ROWS)
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = _product(x, weight, bias, i, j, M, O, K, HAS_BIAS, ROWS, COLUMNS, STEP)
    at = out + i[:, None] * O + j[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (i < M)[:, None] & (j < O)[None, :])


@triton.jit(do_not_specialize=["M"])
def linear_tma_kernel(
    bias,
    x,
    weight,
    out,
    M,
    O,
    K,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    """`linear_kernel` of tensor descriptors x [M, K], weight [O, K] and out [M, O]: the GPU's own engine
    copies tiles, zeros outside. A program has every n-th tile, so that one's stores overlap the next's loads;
    with SPECIALIZE other warps load than multiply.
    """
    columns = tl.cdiv(O, COLUMNS)
    tiles = tl.cdiv(M, ROWS) * columns
    for number in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=True, warp_specialize=SPECIALIZE
    ):
        row, column = _place(number, M, columns, ROWS)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, STEP):
            a = x.load([row * ROWS, k])
            b = weight.load([column * COLUMNS, k])
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if HAS_BIAS:
            j = column * COLUMNS + tl.arange(0, COLUMNS)
            acc += tl.load(bias + j, j < O, 0.0).to(tl.float32)[None, :]
        out.store([row * ROWS, column * COLUMNS], acc.to(out.dtype))


@triton.jit(do_not_specialize=["M"])
def linears_kernel(
    x,
    weight_0,
    weight_1,
    weight_2,
    bias_0,
    bias_1,
    bias_2,
    out_0,
    out_1,
    out_2,
    M,
    O_0,
    O_1,
    O_2,
    K,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """`linear_kernel` of three weights: their column tiles lie side by side."""
    first = tl.cdiv(O_0, COLUMNS)
    second = first + tl.cdiv(O_1, COLUMNS)
    row, column = _place(tl.program_id(0), M, second + tl.cdiv(O_2, COLUMNS), ROWS)
    weight = weight_0
    bias = bias_0
    out = out_0
    O = O_0
    before = first * 0
    if column >= second:
        weight = weight_2
        bias = bias_2
        out = out_2
        O = O_2
        before = second
    elif column >= first:
        weight = weight_1
        bias = bias_1
        out = out_1
        O = O_1
        before = first
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = (column - before).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = _product(x, weight, bias, i, j, M, O, K, HAS_BIAS, ROWS, COLUMNS, STEP)
    at = out + i[:, None] * O + j[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (i < M)[:, None] & (j < O)[None, :])


@triton.jit(do_not_specialize=["M"])
def gate_up_kernel(
    x,
    gate,
    up,
    gate_bias,
    up_bias,
    out,
    M,
    O,
    K,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of silu(x @ gate^T) * (x @ up^T), both rounded as `linear_kernel` stores them."""
    row, column = _place(tl.program_id(0), M, tl.cdiv(O, COLUMNS), ROWS)
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    g, u = _products(x, gate, up, i, j, M, O, K, ROWS, COLUMNS, STEP)
    if HAS_BIAS:
        g += tl.load(gate_bias + j, j < O, 0.0).to(tl.float32)[None, :]
        u += tl.load(up_bias + j, j < O, 0.0).to(tl.float32)[None, :]
    g = g.to(out.dtype.element_ty).to(tl.float32)
    u = u.to(out.dtype.element_ty).to(tl.float32)
    y = g * (1.0 / (1.0 + tl.exp(-g))) * u
    at = out + i[:, None] * O + j[None, :]
    tl.store(at, y.to(out.dtype.element_ty), (i < M)[:, None] & (j < O)[None, :])


@triton.jit(do_not_specialize=["M"])
def add_scaled_kernel(
    x, weight, out, scale, M, O, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr
):
    """One tile of out + scale * (x @ weight^T), rounded to 16 bits after each step, as three ops do."""
    row, column = _place(tl.program_id(0), M, tl.cdiv(O, COLUMNS), ROWS)
    i = row.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = column.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    element = out.dtype.element_ty
    product = _product(x, weight, x, i, j, M, O, K, False, ROWS, COLUMNS, STEP).to(element)
    scaled = (product.to(tl.float32) * scale).to(element)
    at = out + i[:, None] * O + j[None, :]
    real = (i < M)[:, None] & (j < O)[None, :]
    total = tl.load(at, real, 0.0).to(tl.float32) + scaled.to(tl.float32)
    tl.store(at, total.to(element), real)


def tile(M: int, blocks_of: tuple[int, ...], narrow: bool, weights: int = 1) -> dict[str, int]:
    """The launch for M rows, outputs `blocks_of` that share no tile, and inputs of 16 bits or of 32, where a
    program multiplies its rows with so many weights. Up to DECODE rows the tile that should take least time.
    """
    if not narrow:
        return {"ROWS": 64, "COLUMNS": 32, "STEP": 32, "num_warps": 4, "num_stages": 3}
    if M > DECODE:
        return LARGE
    tall = max(FEW, 2 * M - 1)  # of which at least half are rows
    among = [tiles for tiles in fitting(weights) if tiles["ROWS"] <= tall]
    least: dict[str, int] = min(among, key=lambda tiles: _seconds(tiles, M, blocks_of, weights))
    return staged(least, weights)


def staged(tiles: dict[str, int], weights: int) -> dict[str, int]:
    """The launch of a tile, with three stages of loads or more, if two programs have room for them."""
    stage = 2 * 64 * (tiles["ROWS"] + tiles["COLUMNS"] * weights)
    return {**tiles, "STEP": 64, "num_stages": max(3, min(tiles["num_stages"], HALF // stage))}


def fitting(weights: int) -> list[dict[str, int]]:
    """The tiles whose sums, one for each weight, leave registers for all else, on an A100 too."""
    return [tiles for tiles in TILES if tiles["COLUMNS"] * weights <= 128]


def _seconds(tiles: dict[str, int], M: int, blocks_of: tuple[int, ...], weights: int) -> float:
    """Of one step along K, by what is read out of the cache, in all and by the multiprocessor that has the
    most programs, and by what that one multiplies."""
    columns = sum(-(-O // tiles["COLUMNS"]) for O in blocks_of)
    programs = -(-M // tiles["ROWS"]) * columns
    width = tiles["COLUMNS"] * weights
    read = 2.0 * (min(M, tiles["ROWS"]) + width)
    multiplied = 2.0 * tiles["ROWS"] * width
    turns = -(-programs // MULTIPROCESSORS)
    return max(programs * read / CACHE, turns * max(read / CACHE_ONE, multiplied / RATE))


def tma_tile(out_bytes: int, chip: int) -> dict[str, Any]:
    """The launch of `linear_tma_kernel` for outputs of 2 or 4 bytes: tiles that fill the shared memory.
    Before Blackwell the compiler (3.7.1) does not specialize this loop's warps, and fails where it has four.
    """
    columns = 256 if out_bytes == 2 else 128
    tiles = {"ROWS": 128, "COLUMNS": columns, "STEP": 64, "num_warps": 8, "num_stages": 3}
    return {**tiles, "SPECIALIZE": chip >= 100}


def descriptors_serve(*matrices: Tensor) -> bool:
    """Whether tensor descriptors take these, contiguous, of 16 bits (the last may be of 32): a row and the
    first byte must be at multiples of 16 bytes.
    """
    aligned = all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.element_size() % 16 == 0 for x in matrices)
    return aligned and matrices[0].element_size() == 2


def forward_tma(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, chip: int) -> Tensor:
    """Fills out [M, O] as `forward` does, to the same bits, where `descriptors_serve`."""
    (M, K), O = x.shape, len(weight)
    tiles = tma_tile(out.element_size(), chip)
    rows, columns, step = (tiles[name] for name in ("ROWS", "COLUMNS", "STEP"))
    blocks = ((x, [rows, step]), (weight, [columns, step]), (out, [rows, columns]))
    described = [TensorDescriptor.from_tensor(matrix, block) for matrix, block in blocks]
    grid = (min(triton.cdiv(M, rows) * triton.cdiv(O, columns), multiprocessors(x)),)
    added = x if bias is None else bias
    launch(linear_tma_kernel, grid, added, *described, M, O, K, HAS_BIAS=bias is not None, **tiles)
    return out


def linears(x: Tensor, weights: Three, biases: Three | None, outs: Three) -> Three:
    """Fills each out [M, O] from x [M, K] and its weight [O, K], as `forward` does, in one launch."""
    M, K = x.shape
    sizes = [len(weight) for weight in weights]
    if M:
        tiles = tile(M, tuple(sizes), x.element_size() == 2)
        columns = sum(triton.cdiv(O, tiles["COLUMNS"]) for O in sizes)
        tensors = (x, *weights, *(weights if biases is None else biases), *outs)
        grid = (triton.cdiv(M, tiles["ROWS"]) * columns,)
        launch(linears_kernel, grid, *tensors, M, *sizes, K, HAS_BIAS=biases is not None, **tiles)
    return outs


def gate_up(x: Tensor, gate: Tensor, up: Tensor, biases: tuple[Tensor, Tensor] | None, out: Tensor) -> Tensor:
    """Fills out [M, O] with silu(x @ gate^T) * (x @ up^T), in one launch. For few rows."""
    O, K = gate.shape
    if M := len(x):
        tiles = tile(M, (O,), x.element_size() == 2, 2)
        tensors = (x, gate, up, *((gate, up) if biases is None else biases), out)
        grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(O, tiles["COLUMNS"]),)
        launch(gate_up_kernel, grid, *tensors, M, O, K, HAS_BIAS=biases is not None, **tiles)
    return out


def add_scaled(x: Tensor, weight: Tensor, scale: float, out: Tensor) -> Tensor:
    """Adds scale * (x [M, K] @ weight [O, K]^T) to out [M, O], of 16 bits, in one launch."""
    (M, K), O = x.shape, len(weight)
    if M:
        tiles = tile(M, (O,), True)
        grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(O, tiles["COLUMNS"]),)
        launch(add_scaled_kernel, grid, x, weight, out, scale, M, O, K, **tiles)
    return out


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, exact: bool) -> Tensor:
    """Fills out [..., O]; all contiguous. Unless `exact` by torch, whose bits depend on M."""
    O, K = weight.shape
    x = x.view(-1, K) if K else x.flatten(0, -2)
    M = out.numel() // max(O, 1)
    if not exact:
        if bias is None and out.dtype == x.dtype:
            torch.mm(x, weight.t(), out=out.view(M, O))
            return out
        wider = x.is_cuda and out.dtype != x.dtype
        product = torch.mm(x, weight.t(), out_dtype=out.dtype) if wider else torch.mm(x, weight.t())
        return out.copy_((product if bias is None else product + bias).view(out.shape))
    if M > DECODE and K and O and (chip := capability(x)) in TMA_CHIPS and descriptors_serve(x, weight, out):
        forward_tma(x, weight, bias, out.view(M, O), chip)
    elif M * O:
        tiles = tile(M, (O,), x.element_size() == 2)
        grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(O, tiles["COLUMNS"]),)
        tensors = (x, weight, x if bias is None else bias, out)
        launch(linear_kernel, grid, *tensors, M, O, K, HAS_BIAS=bias is not None, **tiles)
    return out
