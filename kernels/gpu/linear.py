"""linear on CUDA with one order of summation: the kernel of `duologue::linear` in exact mode, and its
launcher.

Why a row's bits do not depend on M: K is walked in ascending order in one loop by one program (no split-K),
fp32 accumulates, and rows past M are zeros. Tiles of few and of many rows differ only in their rows and
columns, which share no sum; both are at least 64 rows high, so that Hopper multiplies both by the same
instruction family (wgmma), in steps of 16 along K. fp32 inputs are multiplied in fp32, without tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from duologue.kernels.gpu.launcher import launch
from torch import Tensor


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
    """One tile of out [M, O] = x [M, K] @ weight [O, K]^T + bias [O]; eight row tiles in turn share a panel
    of the weight."""
    rows = tl.cdiv(M, ROWS)
    columns = tl.cdiv(O, COLUMNS)
    group = tl.program_id(0) // (8 * columns)
    place = tl.program_id(0) % (8 * columns)
    height = tl.minimum(rows - group * 8, 8)
    i = (group * 8 + place % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    j = (place // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, STEP):
        k = start + tl.arange(0, STEP)
        a = tl.load(x + i[:, None] * K + k[None, :], (i < M)[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(weight + j[None, :] * K + k[:, None], (j < O)[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + j, j < O, 0.0).to(tl.float32)[None, :]
    at = out + i[:, None] * O + j[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), (i < M)[:, None] & (j < O)[None, :])


def tile(few: bool, O: int, narrow: bool) -> dict[str, int]:
    """The launch for few (at most 64) or many rows, O outputs, and inputs of 16 bits or of 32."""
    if not narrow:
        return {"ROWS": 64, "COLUMNS": 32, "STEP": 32, "num_warps": 4, "num_stages": 3}
    if few:  # bound by reading the weight: enough tiles for all multiprocessors
        return {"ROWS": 64, "COLUMNS": 16 if O < 4096 else 32, "STEP": 64, "num_warps": 4, "num_stages": 6}
    return {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "num_warps": 8, "num_stages": 3}


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, exact: bool) -> Tensor:
    """Fills out [..., O]; all contiguous. Unless `exact` by torch, whose bits depend on M."""
    O, K = weight.shape
    x = x.view(-1, K) if K else x.flatten(0, -2)
    M = out.numel() // max(O, 1)
    if not exact:
        wider = x.is_cuda and out.dtype != x.dtype
        product = torch.mm(x, weight.t(), out_dtype=out.dtype) if wider else torch.mm(x, weight.t())
        return out.copy_((product if bias is None else product + bias).view(out.shape))
    if M * O:
        tiles = tile(M <= 64, O, x.element_size() == 2)
        grid = (triton.cdiv(M, tiles["ROWS"]) * triton.cdiv(O, tiles["COLUMNS"]),)
        tensors = (x, weight, x if bias is None else bias, out)
        launch(linear_kernel, grid, *tensors, M, O, K, HAS_BIAS=bias is not None, **tiles)
    return out
