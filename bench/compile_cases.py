"""What the launchers of linear, rows, attention and softmax ask of Triton, to be compiled ahead of time.

A case is (kernel, types of its arguments by name, constants by name, warps); types are Triton's strings, such as "*fp32" or "i64". The
constants may name the launch options num_stages and enable_fp_fusion. Kernel modules may offer their own `compile_cases()`;
bench/compile_check.py takes all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from duologue.kernels.gpu import attention as gpu_attention
from duologue.kernels.gpu import linear as gpu_linear
from duologue.kernels.gpu import rows as gpu_rows
from duologue.kernels.gpu import sampler as gpu_sampler
from duologue.kernels.gpu import softmax as gpu_softmax

Case = tuple[Any, dict[str, str], dict[str, Any], int]

TYPES = {
    **dict.fromkeys(
        ("M", "O", "K", "N", "S", "V", "D", "Hq", "Hk", "size", "max_position", "max_pages", "n_chunks"),
        "i32",
    ),
    **dict.fromkeys(("table", "cu_seqlens", "context_lens", "shared", "top_k"), "*i32"),
    **dict.fromkeys(("targets", "positions", "slots", "token", "seed", "position", "source"), "*i64"),
    **dict.fromkeys(("eps", "sign", "scale"), "fp32"),
    **dict.fromkeys(("stats", "delta", "parts", "part_stats", "partial", "cos", "sin", "cuts"), "*fp32"),
    **dict.fromkeys(
        (
            "temperature",
            "top_p",
            "min_p",
            "temperatures",
            "logprob",
            "entropy",
            "grad_logprob",
            "grad_entropy",
        ),
        "*fp32",
    ),
}


def case(kernel: Any, element: str, constants: dict[str, Any], **types: str) -> Case:
    """Arguments of no type in TYPES point to `element`; constants that the kernel does not have are dropped."""
    known = {
        name: value
        for name, value in constants.items()
        if name in kernel.arg_names or name in ("num_stages", "enable_fp_fusion")
    }
    signature = {
        name: types.get(name, TYPES.get(name, element)) for name in kernel.arg_names if name not in known
    }
    return kernel, signature, known, constants["num_warps"]


def linear_cases() -> Iterator[Case]:
    for few, O, narrow in ((True, 1024, True), (True, 4096, True), (False, 4096, True), (False, 4096, False)):
        element = "*bf16" if narrow else "*fp32"
        for out in {element, "*fp32"}:
            yield case(
                gpu_linear.linear_kernel,
                element,
                {"HAS_BIAS": False, **gpu_linear.tile(few, O, narrow)},
                out=out,
            )


def rows_cases() -> Iterator[Case]:
    rows = gpu_rows
    for element in ("*fp32", "*bf16"):
        for K, on in product((128, 4096), (False, True)):
            flags = {"HAS_RESIDUAL": on, "HAS_TOTAL": on, "STEPS": rows.STEPS, **rows.norm_tile(K)}
            yield case(rows.rms_norm_kernel, element, flags)
            yield case(rows.rms_norm_backward_kernel, element, flags)
        for on in (False, True):
            yield case(rows.silu_mul_kernel, element, {"BACKWARD": on, "BLOCK": rows.GATE, "num_warps": 4})
            yield case(
                rows.rotary_kernel, element, {"ROTATE": on, "HALF": 64, "HEADS": rows.HEADS, "num_warps": 4}
            )


def attention_cases() -> Iterator[Case]:
    a = gpu_attention
    for D, element in ((64, "*bf16"), (128, "*bf16"), (128, "*fp32")):
        tile = {**a.tile(D, element == "*bf16"), "CHUNK": a.CHUNK}
        for page, split, prefix in (
            (0, False, 0),
            (16, False, 0),
            (16, True, 0),
            (16, True, 1),
            (16, True, 2),
        ):
            form = {"PAGE": page, "SPLIT": split, "PREFIX": prefix, **tile}
            yield case(a.attention_kernel, element, form, out="*fp32" if split else element)
        yield case(a.merge_kernel, element, {**tile, "num_warps": 1})
        yield case(a.grad_query_kernel, element, tile)
        yield case(a.grad_key_kernel, element, tile)


def head_cases() -> Iterator[Case]:
    h = gpu_sampler
    for N, element in ((16, "*bf16"), (64, "*bf16"), (256, "*bf16"), (64, "*fp32")):
        flags = {"HAS_BIAS": False, "CAPPED": False, **h.tile(N, element == "*bf16")}
        yield case(h.linear_sample_kernel, element, flags, numbers="*fp32", ids="*i32", softcap="fp32")


def softmax_cases() -> Iterator[Case]:
    s = gpu_softmax
    for element, by_row in product(("*fp32", "*bf16"), (False, True)):
        yield case(s.logprob_kernel, element, {"BY_ROW": by_row, **s.LAUNCH}, temperature="fp32")
        yield case(
            s.logprob_backward_kernel,
            element,
            {"BY_ROW": by_row, "MOVES": False, **s.LAUNCH},
            temperature="fp32",
        )
    for element in ("*fp32", "*bf16", "*fp16"):  # of the fused head: fp32 logits, a gradient to multiply with
        yield case(
            s.logprob_backward_kernel,
            "*fp32",
            {"BY_ROW": True, "MOVES": True, **s.LAUNCH},
            temperature="fp32",
            grad=element,
        )
    for element in ("*fp32", "*bf16"):
        yield case(s.sample_kernel, element, s.LAUNCH)
        yield case(s.keep_kernel, element, s.LAUNCH, kept="*i32", sizes="*i32", most="i32")


def compile_cases() -> list[Case]:
    return [*linear_cases(), *rows_cases(), *attention_cases(), *head_cases(), *softmax_cases()]
