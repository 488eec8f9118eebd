"""The Triton kernels in the interpreter, started by tests/test_triton.py: against float64, plain PyTorch's
error, and their own bits.

fp32 and fp16: the interpreter's bf16 is not reliable.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import Any

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from duologue.kernels import attention, backend, ops, reference, softmax
from duologue.kernels.gpu import attention as gpu_attention
from duologue.kernels.gpu import launcher
from duologue.kernels.gpu import linear as gpu_linear
from duologue.kernels.gpu import softmax as gpu_softmax
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder, score
from duologue.rollout.engine import attention as engine_attention
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import cases, cases_attention

assert backend.triton(torch.ones(1)), "TRITON_INTERPRET=1 must be set"
interpreter.replace_language_once()
DTYPES = (torch.float32, torch.float16)
OPS = ("linear", "rms_norm", "add_rms_norm", "rope", "silu_mul", "logprob", "packed_attention")
ODD = [
    c
    for op in OPS
    for c in (*cases.CASES.get(op, ()), *cases_attention.CASES.get(op, ()))
    if c.kind == cases.ODD
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of values that a mask removes


def outputs_and_gradients(fn: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    """The op's outputs and the gradients of a fixed random projection of them; tables stay as they are."""
    floats = [
        isinstance(a, Tensor) and a.is_floating_point() and not (a.dim() == 2 and a.shape[0] == 256)
        for a in arguments
    ]
    cast = [a.to(dtype).detach().requires_grad_() if f else a for a, f in zip(arguments, floats, strict=True)]
    found = fn(*cast)
    outputs = list(found) if isinstance(found, tuple) else [found]
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    inputs = [c for c, f in zip(cast, floats, strict=True) if f]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ODD, ids=lambda c: f"{c.op} {c.name}")
def test_error_is_at_most_that_of_plain_torch(case: Any, dtype: torch.dtype) -> None:
    arguments, plain, ours = case.make(dtype), getattr(reference, case.op), getattr(ops, case.op)
    exact = outputs_and_gradients(plain, arguments, torch.float64)
    theirs = outputs_and_gradients(plain, arguments, dtype)
    found = outputs_and_gradients(ours, arguments, dtype)
    for i, (a, b, e) in enumerate(zip(found, theirs, exact, strict=True)):
        assert a.dtype == b.dtype
        cancels = (
            float(e.norm()) < 1e-3
        )  # one element or key: the gradient is what is left of terms of the order of 1
        floor = max(float(e.norm()), cancels * 2 * e.numel() ** 0.5) * torch.finfo(a.dtype).eps
        limit = (2 if i < 2 - (case.op in ("linear", "packed_attention")) else 3) * float(
            (b.double() - e).norm()
        ) + floor
        assert float((a.double() - e).norm()) <= limit, i


# ---- bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_at_every_m(dtype: torch.dtype) -> None:
    x, weight, norm = (
        cases.randn(129, 70, dtype=dtype),
        cases.randn(37, 70, dtype=dtype),
        cases.randn(70, dtype=dtype),
    )
    targets, z = torch.arange(129) % 127, 3 * cases.randn(129, 127, dtype=dtype)
    runs = (
        lambda rows: (ops.linear(x[rows], weight), ops.linear(x[rows], weight, None, torch.float32)),
        lambda rows: (ops.rms_norm(x[rows], norm, 1e-6), *ops.add_rms_norm(x[rows], x[rows] * 2, norm, 1e-6)),
        lambda rows: ops.logprob(z[rows], targets[rows], 0.7),
    )
    for run in runs:
        whole = run(slice(None))
        for a, b in ((0, 1), (0, 7), (1, 65), (64, 129), (128, 129)):
            assert all(
                torch.equal(part, full[a:b]) for part, full in zip(run(slice(a, b)), whole, strict=True)
            )


def launched(monkeypatch: pytest.MonkeyPatch, call: Any) -> list[str]:
    """Names of the linear kernels that are launched where the GPU has tensor descriptors."""
    names: list[str] = []

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        launcher.launch(kernel, *arguments, **constants)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_linear, "capability", lambda _: 90)
        patch.setattr(gpu_linear, "launch", launch)
        call()
    return names


@pytest.mark.parametrize(
    ("M", "K", "O", "wide", "bias"),
    [
        (1, 8, 8, False, True),
        (63, 200, 24, True, False),
        (129, 72, 520, False, True),
        (513, 72, 136, True, True),
    ],
)
def test_tensor_descriptors_change_no_bit(M: int, K: int, O: int, wide: bool, bias: bool) -> None:
    x, weight = cases.randn(M, K, dtype=torch.float16), cases.randn(O, K, dtype=torch.float16)
    added = cases.randn(O, dtype=torch.float16) if bias else None
    expected = ops.linear(x, weight, added, torch.float32 if wide else None)
    found = torch.full_like(expected, float("nan"))
    assert gpu_linear.descriptors_serve(x, weight, found)
    assert torch.equal(gpu_linear.forward_tma(x, weight, added, found, 90), expected)


def test_tensor_descriptors_serve_many_aligned_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they do not take goes the old way: few rows, rows or first bytes that are not aligned, fp32."""
    x, weight = cases.randn(514, 24, dtype=torch.float16), cases.randn(16, 24, dtype=torch.float16)
    shifted = torch.empty(513 * 24 + 1, dtype=torch.float16)[1:].view(513, 24).copy_(x[:513])
    old, new = ["linear_kernel"], ["linear_tma_kernel"]
    for a, b, kernels in (
        (x[:513], weight, new),
        (x[1:].view(3, 171, 24), weight, new),  # from byte 48 on
        (x[:512], weight, old),
        (shifted, weight, old),
        (x[:513, :20], weight[:, :20], old),
        (x[:513], weight[:15], old),
        (x[:513].float(), weight.float(), old),
    ):
        found: list[Tensor] = []
        assert launched(monkeypatch, lambda a=a, b=b, found=found: found.append(ops.linear(a, b))) == kernels
        assert torch.equal(found[0], ops.linear(a, b))


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def pages_of(
    k: Tensor, v: Tensor, lengths: list[int], B: int, shared: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys scattered over random pages, NaN where there are none; `shared` pages are those of the first
    sequence in all."""
    counts = [-(-n // B) for n in lengths]
    order = torch.randperm(sum(counts) + 3).int()
    pages = torch.full((2, len(order), B, *k.shape[1:]), float("nan"), dtype=k.dtype)
    table = torch.full((len(lengths), max(counts)), -1, dtype=torch.int32)
    start = 0
    for s, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[s, :count] = order[sum(counts[:s]) : sum(counts[:s]) + count]
        table[s, :shared] = table[0, :shared]
        slots = table[s].long()[torch.arange(n) // B] * B + torch.arange(n) % B
        reference.write_kv(k[start : start + n], v[start : start + n], pages[0], pages[1], slots)
        start += n
    return pages[0], pages[1], table


@pytest.mark.parametrize(
    ("dtype", "D", "ratio", "B"),
    [(torch.float32, 20, 2, 16), (torch.float16, 32, 1, 48), (torch.float16, 24, 2, 64)],
)
def test_paged_is_packed_bit_for_bit(dtype: torch.dtype, D: int, ratio: int, B: int) -> None:
    """Decode, prefill in pieces and mixes of both, chunks in a loop or side by side: the bits of the packed
    forward."""
    torch.manual_seed(D)
    rng, lengths = random.Random(D), [1, 130, 7, 270]
    k, v = (torch.randn(sum(lengths), 2, D).to(dtype) for _ in range(2))
    q, cu = torch.randn(sum(lengths), 2 * ratio, D).to(dtype), offsets(lengths)
    packed = ops.packed_attention(q, k, v, cu, 0.2)
    k_pages, v_pages, table = pages_of(k, v, lengths, B)
    for new_tokens, split in ((1, True), (1, False), (40, None)):
        ends = [rng.randint(max(1, n - 20), n) for n in lengths]
        new = [min(end, rng.randint(1, new_tokens)) for end in ends]
        order = rng.sample(range(len(lengths)), k=3)
        token = torch.cat([torch.arange(cu[s] + ends[s] - new[s], cu[s] + ends[s]) for s in order])
        out = torch.empty_like(q[token])
        context = torch.tensor([ends[s] for s in order], dtype=torch.int32)
        arguments = (
            k_pages,
            v_pages,
            out,
            None,
            offsets([new[s] for s in order]),
            0.2,
            table[order],
            context,
        )
        gpu_attention.forward(q[token], *arguments, split=split)
        assert torch.equal(out, packed[token])
        assert torch.equal(
            ops.paged_attention(q[token], k_pages, v_pages, table[order], *arguments[4:5], context, 0.2), out
        )


def test_a_shared_prefix_read_once_changes_no_bit() -> None:
    torch.manual_seed(0)
    dtype, lengths, B, shared = (
        torch.float16,
        [300, 320, 270, 40],
        16,
        17,
    )  # 272 keys common to the first two: one whole chunk
    k, v = (torch.randn(sum(lengths), 2, 16).to(dtype) for _ in range(2))
    k_pages, v_pages, table = pages_of(k, v, lengths, B)
    table[1, :shared] = table[0, :shared]
    q, out = torch.randn(4, 4, 16).to(dtype), torch.empty(1, 4, 4, 16, dtype=dtype)
    arguments = (None, offsets([1] * 4), 0.3, table, torch.tensor(lengths, dtype=torch.int32))
    gpu_attention.forward(q, k_pages, v_pages, out[0], *arguments)
    groups = (
        torch.tensor([0, 2, 3, 4], dtype=torch.int32),
        torch.tensor([shared * B, 256, 0], dtype=torch.int32),
    )
    wide = (q.double(), k_pages.double(), v_pages.double())
    exact = reference.paged_attention(*wide, *arguments[3:4], *arguments[1:2], arguments[4], 0.3)
    torch.testing.assert_close(out[0].double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)
    table[1, :16] = 0  # of a chunk in common only the first member's table is read
    step = (q, k_pages, v_pages, table, arguments[1], arguments[4], 0.3)
    assert torch.equal(ops.paged_attention(*step, groups), out[0])
    work = attention.decode_work(4, k_pages, table, arguments[4])  # nothing shared: sequence 1 has page 0
    apart = ops.paged_attention(*step, None, work)
    assert torch.equal(apart[[0, 2, 3]], out[0, [0, 2, 3]])
    assert not torch.equal(apart[1], out[0, 1])
    with pytest.raises(ValueError, match="4 queries of 3 sequences, accepted with groups is one of each"):
        ops.paged_attention(*step[:3], table[:3], offsets([2, 1, 1]), arguments[4][:3], 0.3, groups)


def test_write_kv_is_that_of_the_reference() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(5, 7, 150) for _ in range(2))  # more than a program's elements
    slots = torch.tensor([33, 2, 16, 47, 0])
    pages = torch.zeros(4, 3, 16, 7, 150)
    ops.write_kv(k, v, pages[0], pages[1], slots)
    reference.write_kv(k, v, pages[2], pages[3], slots)
    assert torch.equal(pages[:2], pages[2:])


# ---- sampling ----------------------------------------------------------------------------------------------


@triton.jit
def noise_kernel(seed, position, out, BLOCK: tl.constexpr):
    for start in range(0, 2 * BLOCK, BLOCK):
        tl.store(
            out + start + tl.arange(0, BLOCK),
            gpu_softmax.noise(tl.load(seed), tl.load(position), start // 4 + tl.arange(0, BLOCK // 4)),
        )


@pytest.mark.parametrize(
    ("seed", "position"), [(0, 0), (-7, 2**33 + 5), (2**62 + 12345, -1), (-(2**63), 2**63 - 1)]
)
def test_noise_has_the_words_of_the_reference(seed: int, position: int) -> None:
    out, seeds, positions = torch.empty(512), torch.tensor([seed]), torch.tensor([position])
    noise_kernel[(1,)](seeds, positions, out, BLOCK=256)
    exact = -torch.log(-torch.log1p(-reference.uniforms(seeds, positions, 512).double()))
    torch.testing.assert_close(
        out.double(), exact[0], rtol=3e-7, atol=3e-7
    )  # one word wrong is an error of the order of 1


def draws(N: int, V: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(N, V, generator=generator)
    temperature = torch.rand(N, generator=generator) + 0.3
    temperature[::5] = 0
    top_k = torch.randint(0, 20, (N,), generator=generator).int() * (torch.arange(N) % 2).int()
    top_p = torch.where(torch.arange(N) % 3 == 0, 1.0, torch.rand(N, generator=generator))
    min_p = torch.where(torch.arange(N) % 4 == 0, 0.1 * torch.rand(N, generator=generator), 0.0)
    seed = torch.randint(-(2**62), 2**62, (N,), generator=generator)
    return logits, (temperature, top_k, top_p, min_p, seed, torch.randint(2**40, (N,), generator=generator))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_draws_what_the_reference_and_cpp_draw(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, args = draws(30, 331)
    logits = logits.to(dtype)
    token, logprob, entropy, kept, offsets = ops.sample(logits, *args)
    expected = reference.sample(logits, *args)
    assert torch.equal(token, expected[0])
    assert torch.equal(kept, expected[3])
    assert torch.equal(offsets, expected[4])
    torch.testing.assert_close((logprob, entropy), expected[1:3], rtol=1e-5, atol=1e-5)
    of_logprob = ops.logprob(logits, token, torch.where(args[0] == 0, 1.0, args[0]))
    whole = offsets.diff() == 0  # not truncated: the very bits of log-prob
    assert whole.any()
    assert not whole.all()
    assert torch.equal(logprob[whole], of_logprob[0][whole])
    assert torch.equal(entropy[whole], of_logprob[1][whole])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))[:9]
    part = ops.sample(logits[order], *(x[order] for x in args))
    assert all(torch.equal(a, b[order]) for a, b in zip(part, (token, logprob, entropy), strict=False))
    if backend.available():
        monkeypatch.setattr(backend, "_INTERPRETS", False)
        assert backend.cpp(logits.float())
        assert torch.equal(ops.sample(logits.float(), *args)[0], token)


@pytest.mark.parametrize("extra", ["", "bias", "softcap"])
@pytest.mark.parametrize(
    ("N", "H", "V", "dtype"),
    [(1, 8, 7, torch.float32), (21, 40, 1300, torch.float32), (37, 24, 531, torch.float16)],
)
def test_head_and_sampler_in_one_pass(N: int, H: int, V: int, dtype: torch.dtype, extra: str) -> None:
    """No stored logits: the draws of the stored ones, and their log-prob and entropy up to rounding."""
    hidden, weight = cases.randn(N, H, dtype=dtype), cases.randn(V, H, dtype=dtype)
    bias, softcap = (
        cases.randn(V, dtype=dtype) if extra == "bias" else None,
        4.0 if extra == "softcap" else None,
    )
    _, (temperature, _, _, _, seed, position) = draws(N, V)
    settings = (temperature, torch.zeros(N).int(), torch.ones(N), torch.zeros(N), seed, position)
    token, logprob, entropy, kept, offsets = ops.linear_sample(
        hidden, weight, *settings, bias=bias, softcap=softcap, exact=False, whole=True
    )
    wide = None if bias is None else bias.double()
    logits = ops.head(hidden.double(), weight.double(), wide, softcap).float()
    expected = reference.sample(logits, *settings)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close((logprob, entropy), expected[1:3], rtol=2e-5, atol=2e-5)
    assert len(kept) == 0
    assert not offsets.any()


def test_the_cut_is_that_of_the_reference() -> None:
    logits, (temperature, top_k, top_p, min_p, *counters) = draws(24, 331)
    logits[::3] = logits[::3].round()  # ties stay or go together
    temperature = temperature.clamp(min=0.3)
    outputs = (torch.empty(24, dtype=torch.int64), torch.empty(24), torch.empty(24))
    cuts = gpu_softmax.sample(logits, [temperature, top_k, top_p, min_p, *counters], *outputs)
    kept = reference.keep_mask(logits / temperature.unsqueeze(1), top_k, top_p, min_p)
    assert torch.equal(logits > cuts.unsqueeze(1), kept)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, 4099)
    logits[0, [4098, 2100]] = 2.0
    logits[1, 4098] = 1.0
    logits[2] = float("-inf")
    logits[2, 3000] = -5.0
    ones, ids = torch.ones(3), torch.arange(3)
    token = ops.sample(logits, 0 * ones, ids.int(), 0.5 * ones, 0 * ones, ids, ids)[0]
    assert token.tolist() == [2100, 4098, 3000]


def test_impossible_tokens_count_as_nothing() -> None:
    z, targets = 4 * cases.randn(4, 127, dtype=torch.float32), torch.tensor([0, 3, 6, 9])
    masked = torch.full_like(z, float("-inf"))
    masked[:, ::3] = z[:, ::3]
    found = outputs_and_gradients(lambda x: ops.logprob(x, targets, 0.9), (masked,), torch.float32)
    exact = outputs_and_gradients(
        lambda x: ops.reference.logprob(x, targets // 3, 0.9), (z[:, ::3],), torch.float64
    )
    for a, b in zip((*found[:2], found[2][:, ::3]), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6)
    assert found[2].count_nonzero() == found[2][:, ::3].count_nonzero()


# ---- the head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extra", ["", "bias", "softcap"])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 8, 7), (23, 24, 129), (31, 17, 1300)])
def test_policy_loss_of_the_fused_head(N: int, H: int, V: int, extra: str, dtype: torch.dtype) -> None:
    """Chunks of a few rows, most of them without a coefficient, so that rows move: against float64 of the
    stored logits."""
    inputs = [cases.randn(N, H, dtype=dtype), cases.randn(V, H, dtype=dtype) / 3]
    inputs += [cases.randn(V, dtype=dtype)] if extra == "bias" else []
    softcap, targets = 5.0 if extra == "softcap" else None, torch.arange(N) * 3 % V
    g, h = (
        torch.linspace(-1, 1, N) * (torch.arange(N) % 3 == 1),
        torch.linspace(1, 0, N) * (torch.arange(N) % 3 == 2),
    )

    def ours(x: list[Tensor]) -> list[Tensor]:
        found = ops.linear_policy_loss(
            x[0],
            x[1],
            targets,
            lambda logp, entropy, rows: (logp * g[rows] - entropy * h[rows]).sum(),
            temperature=0.8,
            bias=x[2] if extra == "bias" else None,
            softcap=softcap,
            chunk_bytes=9 * V * 6,
        )
        return [found.logprob, found.entropy, *torch.autograd.grad(found.loss, x)]

    def plain(x: list[Tensor]) -> list[Tensor]:
        logits = torch.nn.functional.linear(*x).to(
            torch.float32 if x[0].dtype != torch.float64 else torch.float64
        )
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logp, entropy = reference.logprob(logits, targets, 0.8)
        return [
            logp.detach(),
            entropy.detach(),
            *torch.autograd.grad((logp * g.to(logp) - entropy * h.to(logp)).sum(), x),
        ]

    exact = plain([x.double().requires_grad_() for x in inputs])
    theirs = plain([x.clone().requires_grad_() for x in inputs])
    found = ours([x.clone().requires_grad_() for x in inputs])
    for i, (a, b, e) in enumerate(zip(found, theirs, exact, strict=True)):
        floor = max(float(e.norm()), 1e-2) * torch.finfo(dtype if i > 1 else torch.float32).eps * 4
        assert (
            float((a.double() - e).norm()) <= (2 if i < 2 else 3) * float((b.double() - e).norm()) + floor
        ), i


def test_the_fused_head_has_the_bits_of_linear_and_logprob() -> None:
    hidden, weight = (cases.randn(rows, 24, dtype=torch.float16) for rows in (20, 300))
    targets = torch.arange(20) * 14
    expected = ops.logprob(ops.linear(hidden, weight, None, torch.float32), targets, torch.full((20,), 0.9))
    found = ops.linear_logprob(hidden[5:12], weight, targets[5:12], 0.9, chunk_bytes=3 * 1800)
    assert all(torch.equal(a, b[5:12]) for a, b in zip(found, expected, strict=True))


# ---- as ops ------------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    x, weight = torch.randn(3, 9, requires_grad=True), torch.randn(4, 9, requires_grad=True)
    q, k, cu = (
        torch.randn(5, 4, 16, requires_grad=True),
        torch.randn(5, 2, 16, requires_grad=True),
        offsets([2, 3]),
    )
    registered = torch.ops.duologue
    torch.library.opcheck(registered.linear.default, (x, weight, None, torch.float32, True))
    torch.library.opcheck(
        registered.add_rms_norm.default, (x, x.detach().clone().requires_grad_(), torch.ones(9), 1e-6)
    )
    torch.library.opcheck(registered.silu_mul.default, (x, x.detach().clone().requires_grad_()))
    torch.library.opcheck(
        registered.rope.default, (q, k, torch.ones(8, 8), torch.ones(8, 8), torch.arange(5), 1.0)
    )
    torch.library.opcheck(attention.packed_op, (q, k, k.detach().clone().requires_grad_(), cu, 0.25))
    torch.library.opcheck(registered.logprob.default, (x, torch.tensor([0, 8, 3]), None, 0.7))
    logits, args = draws(3, 9)
    torch.library.opcheck(softmax.sample_op, (logits, *args))


@pytest.mark.parametrize("exact", [True, False])
def test_compiled_is_eager(exact: bool) -> None:
    x, weight, norm = (
        cases.randn(6, 32, dtype=torch.float32),
        cases.randn(32, 32, dtype=torch.float32),
        torch.ones(32),
    )

    def block(x: Tensor, weight: Tensor) -> Tensor:
        y, total = ops.add_rms_norm(x, x * 2, norm, 1e-6)
        y = ops.linear(ops.silu_mul(y, total), weight, exact=exact).view(6, 2, 16)
        return ops.logprob(ops.packed_attention(y, y, y, offsets([6]), 0.25).flatten(1), torch.arange(6))[0]

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    both = [outputs_and_gradients(fn, (x, weight), torch.float32) for fn in (block, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.linear(torch.ones(2, 3), torch.ones(4, 5)),
            r"linear: weight has shape \(4, 5\), accepted is \(\*, 3\)",
        ),
        (
            lambda: ops.packed_attention(
                torch.zeros(5, 4, 16), *[torch.zeros(5, 3, 16)] * 2, offsets([5]), 1.0
            ),
            "multiple of 3",
        ),
        (
            lambda: ops.packed_attention(*[torch.zeros(5, 1, 512)] * 3, offsets([5]), 1.0),
            "head dim is 512, accepted is 1 to 256",
        ),
    ],
)
def test_contracts(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_rows() -> None:
    none = torch.empty(0, 4, 16)
    assert ops.packed_attention(none, none, none, offsets([0, 0]), 1.0).shape == (0, 4, 16)
    assert ops.linear(torch.empty(0, 3), torch.ones(4, 3)).shape == (0, 4)
    assert ops.rms_norm(torch.empty(0, 3), torch.ones(3), 1e-6).shape == (0, 3)
    assert ops.logprob(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))[0].shape == (0,)


def test_rollout_is_score_bit_for_bit() -> None:
    """The engine, with prefill in pieces among decodes, against the training forward, both on these
    kernels."""
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    model = Decoder(config)
    model.init_weights(0)
    prompts = [[5, 7, 9] * 3, [1], list(range(12))]
    engine = Engine(model, max_batch=2, max_step_tokens=7)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=4, top_p=1.0))
    with torch.no_grad():
        scored = score(model, [p + c.token_ids for p, c in zip(prompts, completions, strict=True)])
    for prompt, completion, whole in zip(prompts, completions, scored, strict=True):
        assert torch.equal(torch.tensor(completion.logprobs), whole[len(prompt) - 1 :])


def test_decoding_ahead_with_a_shared_prefix_has_the_bits_of_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device-side loop on these kernels, and without it: rows of a group are read as one, and its first
    ends earlier.
    """
    monkeypatch.setattr(engine_attention, "LEAST_SHARED", 256)
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position_embeddings=640,
    )
    model = Decoder(config)
    model.init_weights(0)
    prefix = [(7 * i) % 61 for i in range(256)]
    prompts = [[*prefix, 5], [*prefix, 9, 3], [1, 2, 3]]
    limits, cuts = (2, 3, 3), (1.0, 0.8, 1.0)  # the first token comes from the prefill
    params = [SamplingParams(max_new_tokens=limits[i], seed=i, top_p=cuts[i]) for i in range(3)]
    found = []
    for steps in (3, 1):
        engine = Engine(model, max_step_tokens=1024, cache_tokens=4096, decode_steps=steps)
        base = engine.open(prefix)
        engine.prefill([base])
        found.append(engine.generate(prompts, params))
        assert engine.stats.shared_tokens >= 512
    for a, b in zip(*found, strict=True):
        assert (a.token_ids, a.logprobs, a.supports) == (b.token_ids, b.logprobs, b.supports)
    whole = (0, 2)  # not truncated
    with torch.no_grad():
        scored = score(model, [prompts[i] + found[0][i].token_ids for i in whole])
    for i, logprobs in zip(whole, scored, strict=True):
        assert torch.equal(torch.tensor(found[0][i].logprobs), logprobs[len(prompts[i]) - 1 :])
