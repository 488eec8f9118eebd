"""What the launchers of kernels/gpu ask of Triton, to be compiled ahead of time by bench/compile_check.py.

A case is (kernel, types of its arguments by name, constants by name, warps); types are Triton's strings, such
as "*fp32" or "i64". The constants may name the launch options num_stages and enable_fp_fusion.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from duologue.kernels.gpu import (
    attention,
    attention_backward,
    attention_decode,
    gather,
    linear,
    rows,
    sampler,
    softmax,
    sparse,
)

Case = tuple[Any, dict[str, str], dict[str, Any], int]

LAUNCH = ("num_stages", "enable_fp_fusion")  # constants that are launch options
NAMES = {  # what arguments of these names are, wherever a case does not say otherwise
    "i32": "M O O_0 O_1 O_2 K N S R V T H D Hq Hk size limit max_position max_pages n_chunks",
    "fp32": "eps sign scale temperature softcap",
    "*i32": "table cu_seqlens context_lens items n_items top_ks ids sizes",
    "*i64": "targets positions slots tokens seeds source order rows starts offsets places ranked",
    "*fp32": "stats delta parts part_stats partial numbers cos sin cuts temperatures top_ps min_ps logprobs "
    "entropies grad_logprobs grad_entropies",
}
TYPES = {name: kind for kind, names in NAMES.items() for name in names.split()}


def case(kernel: Any, element: str, constants: dict[str, Any], **types: str) -> Case:
    """Arguments of no type in TYPES point to `element`; constants that the kernel does not have are
    dropped."""
    known = {name: constants[name] for name in (*kernel.arg_names, *LAUNCH) if name in constants}
    arguments = (name for name in kernel.arg_names if name not in known)
    signature = {name: types.get(name, TYPES.get(name, element)) for name in arguments}
    return kernel, signature, known, constants["num_warps"]


def linear_cases() -> Iterator[Case]:
    """Each tile once."""
    for tile in linear.TILES:
        for out in ("*bf16", "*fp32"):
            flags = {"HAS_BIAS": False, **linear.staged(tile, 1)}
            yield case(linear.linear_kernel, "*bf16", flags, out=out)
    yield case(linear.linear_kernel, "*fp32", {"HAS_BIAS": False, **linear.tile(1, (64,), False)})


def tma_cases(chip: int) -> Iterator[Case]:
    """By tensor descriptors, of the chips that have them."""
    for bytes_, element in ((2, "bf16"), (4, "fp32")) if chip in linear.TMA_CHIPS else ():
        tile = linear.tma_tile(bytes_, chip)
        blocks = {
            "x": f"tensordesc<bf16[{tile['ROWS']}, {tile['STEP']}]>",
            "weight": f"tensordesc<bf16[{tile['COLUMNS']}, {tile['STEP']}]>",
            "out": f"tensordesc<{element}[{tile['ROWS']}, {tile['COLUMNS']}]>",
        }
        yield case(linear.linear_tma_kernel, "*bf16", {"HAS_BIAS": bytes_ == 2, **tile}, **blocks)


def fused_cases() -> Iterator[Case]:
    """Several ops of a decode step in one launch."""
    for tile in linear.TILES:
        one = {"HAS_BIAS": False, **linear.staged(tile, 1)}
        yield case(linear.linears_kernel, "*bf16", one)
        yield case(linear.add_scaled_kernel, "*bf16", one)
        if tile in linear.fitting(2):
            two = {"HAS_BIAS": False, **linear.staged(tile, 2)}
            yield case(linear.gate_up_kernel, "*bf16", two)
    for element in ("*fp32", "*bf16"):
        tile = {"HAS_BIAS": True, **linear.tile(1, (1024,), element == "*bf16")}
        yield case(linear.linears_kernel, element, tile)
        yield case(linear.gate_up_kernel, element, tile)
        for D, on in ((64, False), (128, True)):
            heads = {"HAS_NORM": on, **rows.FIXED, **rows.rotate_write_tile(D)}
            yield case(rows.rotate_write_kernel, element, heads)


def rows_cases() -> Iterator[Case]:
    for element in ("*fp32", "*bf16"):
        for K, on in product((128, 4096), (False, True)):
            flags = {
                "HAS_RESIDUAL": on,
                "HAS_TOTAL": on,
                "STEPS": rows.STEPS,
                **rows.norm_tile(K),
                **rows.FIXED,
            }
            yield case(rows.rms_norm_kernel, element, flags)
            yield case(rows.rms_norm_backward_kernel, element, flags)
        for on in (False, True):
            gate = {"BACKWARD": on, "BLOCK": rows.GATE, "num_warps": 4, **rows.FIXED}
            yield case(rows.silu_mul_kernel, element, gate)
        rotate = {"HALF": 64, "HEADS": rows.HEADS, "num_warps": 4, **rows.FIXED}
        yield case(rows.rotate_kernel, element, rotate)
        yield case(rows.write_kv_kernel, element, {"BLOCK": rows.KV, "num_warps": 4})


def attention_cases(chip: int) -> Iterator[Case]:
    for D, element in ((64, "*bf16"), (128, "*bf16"), (128, "*fp32")):
        narrow = element == "*bf16"
        for page in (0, 16, 64):
            tile = attention.tile(D, narrow, "paged" if page else "packed", chip)
            loop = {"PAGE": page, "SPLIT": False, "CHUNK": attention.CHUNK, **tile}
            yield case(attention.attention_kernel, element, loop)
            if page:
                yield case(attention_decode.decode_attention_kernel, element, loop)
        yield case(attention.attention_kernel, element, {**loop, "SPLIT": True}, out="*fp32")
        for counted in (False, True):
            merge = {**loop, "COUNTED": counted, "num_warps": 1}
            yield case(attention.merge_kernel, element, merge)
        yield case(
            attention_backward.grad_query_kernel, element, attention.tile(D, narrow, "grad_query", chip)
        )
        yield case(attention_backward.grad_key_kernel, element, attention.tile(D, narrow, "grad_key", chip))


def sampler_cases() -> Iterator[Case]:
    for N, element in ((16, "*bf16"), (64, "*bf16"), (256, "*bf16"), (64, "*fp32")):
        flags = {"HAS_BIAS": False, "CAPPED": False, **sampler.tile(N, element == "*bf16")}
        yield case(sampler.linear_sample_kernel, element, flags)


def softmax_cases() -> Iterator[Case]:
    launch = softmax.LAUNCH
    for element, by_row in product(("*fp32", "*bf16"), (False, True)):
        yield case(softmax.logprob_kernel, element, {"BY_ROW": by_row, **launch})
        yield case(softmax.logprob_backward_kernel, element, {"BY_ROW": by_row, "MOVES": False, **launch})
    for element in ("*fp32", "*bf16", "*fp16"):  # of the fused head: fp32 logits, a gradient to multiply with
        moves = {"BY_ROW": True, "MOVES": True, **launch}
        yield case(softmax.logprob_backward_kernel, "*fp32", moves, grad=element)
    for element in ("*fp32", "*bf16"):
        yield case(softmax.sample_kernel, element, launch)
        yield case(softmax.support_kernel, element, launch)


def sparse_cases() -> Iterator[Case]:
    kernels = (sparse.sparse_forward, sparse.sparse_backward, sparse.sparse_weight)
    for element, kernel, on in product(("*fp32", "*bf16"), kernels, (False, True)):
        flags = {"HAS_BIAS": on, "HAS_CAP": on, **sparse.LAUNCH}
        yield case(kernel, element, flags, logits="*fp32", grad="*fp32")


def gather_cases() -> Iterator[Case]:
    for element in ("*fp32", "*bf16"):
        for kernel in (gather.sum_rows_kernel, gather.add_rows_kernel):
            yield case(kernel, element, {"BLOCK": gather.block(4096), "num_warps": 4}, total="*fp32")


def one_head_cases(chip: int) -> Iterator[Case]:
    """Triton makes a constant of a size that is 1 and compiles another kernel: of one key head, and of one
    query head too.
    """
    packed, paged, grad_query, grad_key = (
        {"CHUNK": attention.CHUNK, **attention.tile(128, True, form, chip)}
        for form in ("packed", "paged", "grad_query", "grad_key")
    )
    for heads in ({"Hk": 1}, {"Hk": 1, "Hq": 1}):
        loop = {"PAGE": 0, "SPLIT": False, **heads}
        yield case(attention.attention_kernel, "*bf16", {**loop, **packed})
        yield case(attention.attention_kernel, "*bf16", {**loop, **paged, "PAGE": 64})
        split = {**loop, **paged, "PAGE": 64, "SPLIT": True}
        yield case(attention.attention_kernel, "*bf16", split, out="*fp32")
        yield case(attention_decode.decode_attention_kernel, "*bf16", split)
        yield case(attention_backward.grad_query_kernel, "*bf16", {**grad_query, **heads})
        yield case(attention_backward.grad_key_kernel, "*bf16", {**grad_key, **heads})


def one_cases() -> Iterator[Case]:
    """Likewise of one id of a support, one number per row; and sizes beyond 2^31 are 64 bits wide."""
    yield case(
        rows.rotate_kernel, "*bf16", {"H": 1, "HALF": 64, "HEADS": rows.HEADS, "num_warps": 4, **rows.FIXED}
    )
    yield case(softmax.support_kernel, "*fp32", {"limit": 1, **softmax.LAUNCH})
    yield case(linear.linear_kernel, "*bf16", {"O": 1, "HAS_BIAS": True, **linear.tile(1, (1,), True)})
    yield case(gather.sum_rows_kernel, "*fp32", {"K": 1, "BLOCK": 1, "num_warps": 4})
    yield case(gather.add_rows_kernel, "*bf16", {"T": 1, "BLOCK": 1024, "num_warps": 4}, total="*fp32")
    for on in (False, True):
        gate = {"BACKWARD": on, "BLOCK": rows.GATE, "num_warps": 4, **rows.FIXED}
        yield case(rows.silu_mul_kernel, "*bf16", gate, size="i64")


FAMILIES = (
    gather_cases,
    one_cases,
    linear_cases,
    fused_cases,
    rows_cases,
    sampler_cases,
    softmax_cases,
    sparse_cases,
)
BY_CHIP = (one_head_cases, tma_cases, attention_cases)  # whose launches differ


def compile_cases(chip: int = 90) -> list[Case]:
    """Of a GPU of this capability."""
    of_all = [case for family in FAMILIES for case in family()]
    return of_all + [case for family in BY_CHIP for case in family(chip)]
