"""The kernels on a GPU: against float64, plain PyTorch's error in the same dtype, and the promise that bits
do not depend on the batch.

python -m pytest -q -m gpu
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from duologue.kernels import backend, fused, libraries, ops, reference
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to("cuda", dtype)


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


LENGTHS = [1, 7, 127, 129, 600, 1025]
TABLES = torch.randn(2, 2048, 64, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[str, tuple[Any, ...]]] = {  # name: (op, shapes of its float arguments and the others)
    "linear 1": ("linear", ((1, 1024), (3072, 1024), (3072,))),
    "linear 129": ("linear", ((129, 1000), (4100, 1000))),
    "linear 4096": ("linear", ((4096, 1024), (1024, 1024))),
    "rms_norm": ("rms_norm", ((513, 4096), (4096,), 1e-6)),
    "rms_norm heads": ("rms_norm", ((77, 16, 128), (128,), 1e-6)),
    "add_rms_norm": ("add_rms_norm", ((129, 1000), (129, 1000), (1000,), 1e-6)),
    "silu_mul": ("silu_mul", ((127, 3073), (127, 3073))),
    "rope": ("rope", ((129, 9, 128), (129, 3, 128), TABLES[0], TABLES[1], torch.arange(129) * 15)),
    "packed_attention 128": (
        "packed_attention",
        (*[(sum(LENGTHS), heads, 128) for heads in (8, 2, 2)], LENGTHS, 0.09),
    ),
    "packed_attention 80": (
        "packed_attention",
        ((sum(LENGTHS), 4, 80), (sum(LENGTHS), 4, 80), (sum(LENGTHS), 4, 80), LENGTHS, 0.11),
    ),
    "logprob": ("logprob", ((65, 50_257), torch.arange(65) * 700, 0.7)),
}


def arguments(name: str, dtype: torch.dtype) -> list[Any]:
    found: list[Any] = []
    for i, x in enumerate(CASES[name][1]):
        if isinstance(x, tuple):
            found.append(randn(*x, dtype=dtype, seed=i))
        else:
            found.append(offsets(x) if isinstance(x, list) else x.cuda() if isinstance(x, Tensor) else x)
    return found


def run(fn: Any, inputs: list[Any], shapes: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    cast = [
        x.to(dtype).detach().requires_grad_() if isinstance(s, tuple) else x
        for x, s in zip(inputs, shapes, strict=True)
    ]
    out = fn(*cast)
    outputs = list(out) if isinstance(out, tuple) else [out]
    grads = [randn(*o.shape, seed=7).to(o.dtype) for o in outputs]
    wanted = [x for x, s in zip(cast, shapes, strict=True) if isinstance(s, tuple)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, grads)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    op, shapes = CASES[name]
    inputs = arguments(name, dtype)
    exact = run(getattr(reference, op), inputs, shapes, torch.float64)
    theirs = run(getattr(reference, op), inputs, shapes, dtype)
    ours = run(getattr(ops, op), inputs, shapes, dtype)
    n_outputs = 2 if op in ("add_rms_norm", "rope", "logprob") else 1
    for i, (a, b, e) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert a.dtype == b.dtype
        slack = torch.finfo(dtype).eps
        if op == "linear" and dtype == torch.float32:
            slack *= shapes[0][1] ** 0.5  # one chain of K terms; theirs may be many short ones, added up
        limit = (2 if i < n_outputs else 3) * float((b.double() - e).norm()) + float(e.norm()) * slack
        assert float((a.double() - e).norm()) <= limit, i


@pytest.mark.parametrize("op", ["linear", "packed_attention"])
def test_fast_forms_are_close(op: str) -> None:
    name = next(n for n in CASES if n.startswith(op))
    inputs, shapes = arguments(name, torch.bfloat16), CASES[name][1]
    exact = run(getattr(reference, op), inputs, shapes, torch.float64)
    for a, e in zip(
        run(lambda *x: getattr(ops, op)(*x, exact=False), inputs, shapes, torch.bfloat16), exact, strict=True
    ):
        assert float((a.double() - e).norm()) <= 0.02 * float(e.norm())


@pytest.mark.parametrize("name", ["packed_attention 128", "packed_attention 80"])
def test_a_library_takes_the_backward_of_attention(name: str) -> None:
    """Behind the exact forward, near float64, and with the same bits every time."""
    if libraries.attention_backward(randn(1, 1, 128, dtype=torch.bfloat16)) is None:
        pytest.skip(libraries.describe_attention_backward())
    inputs, shapes = arguments(name, torch.bfloat16), CASES[name][1]
    exact = run(reference.packed_attention, inputs, shapes, torch.float64)
    own = run(ops.packed_attention, inputs, shapes, torch.bfloat16)

    def library(*x: Any) -> Tensor:
        return ops.packed_attention(*x, max_seqlen=max(LENGTHS), library_backward=True)

    first, second = (run(library, inputs, shapes, torch.bfloat16) for _ in range(2))
    assert torch.equal(first[0], own[0])
    for a, b, e in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        assert float((a.double() - e).norm()) <= 0.02 * float(e.norm())


# ---- bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "O"), [(1024, 1024), (1024, 6144), (4096, 4096), (1000, 4100)])
def test_linear_has_the_same_bits_at_every_m(K: int, O: int, dtype: torch.dtype) -> None:
    x, weight = randn(1500, K, dtype=dtype), randn(O, K, dtype=dtype)
    for out_dtype in {dtype, torch.float32}:
        whole = ops.linear(x, weight, None, out_dtype)
        for a, b in ((0, 1), (3, 10), (0, 64), (100, 165), (1000, 1128), (1, 1500)):
            assert torch.equal(ops.linear(x[a:b], weight, None, out_dtype), whole[a:b])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_keep_their_bits_in_any_company(dtype: torch.dtype) -> None:
    x, norm, z = randn(300, 1024, dtype=dtype), randn(1024, dtype=dtype), 3 * randn(300, 50_257, dtype=dtype)
    targets = torch.arange(300, device="cuda")
    whole = (*ops.add_rms_norm(x, x * 2, norm, 1e-6), *ops.logprob(z, targets, 0.9))
    for a, b in ((0, 1), (16, 33), (100, 300)):
        part = (*ops.add_rms_norm(x[a:b], x[a:b] * 2, norm, 1e-6), *ops.logprob(z[a:b], targets[a:b], 0.9))
        assert all(torch.equal(p, w[a:b]) for p, w in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "ratio", "B"), [(128, 4, 16), (64, 2, 32), (80, 1, 16)])
def test_decode_prefill_and_training_have_one_set_of_bits(
    dtype: torch.dtype, D: int, ratio: int, B: int
) -> None:
    from duologue.kernels.gpu import attention as gpu_attention

    rng, T = random.Random(D), sum(LENGTHS)
    q, k, v = (randn(T, heads, D, dtype=dtype, seed=heads) for heads in (2 * ratio, 2, 2))
    packed = ops.packed_attention(q, k, v, offsets(LENGTHS), 0.1)
    counts = [-(-n // B) for n in LENGTHS]
    order, pages = (
        torch.randperm(sum(counts)).int().cuda(),
        torch.zeros(2, sum(counts), B, 2, D, dtype=dtype, device="cuda"),
    )
    table = torch.zeros(len(LENGTHS), max(counts), dtype=torch.int32, device="cuda")
    bounds = [0, *itertools.accumulate(LENGTHS)]
    for s, count in enumerate(counts):
        table[s, :count] = order[sum(counts[:s]) : sum(counts[:s]) + count]
        at = torch.arange(LENGTHS[s], device="cuda")
        own = slice(bounds[s], bounds[s + 1])
        ops.write_kv(k[own], v[own], pages[0], pages[1], table[s].long()[at // B] * B + at % B)
    for most, split in ((1, True), (1, False), (1, None), (300, True), (300, False), (2000, None)):
        ends = [rng.randint(max(1, n // 2), n) for n in LENGTHS]
        new = [rng.randint(1, min(most, end)) for end in ends]
        token = torch.cat(
            [torch.arange(bounds[s] + ends[s] - new[s], bounds[s] + ends[s]) for s in range(len(LENGTHS))]
        ).cuda()
        out, context = torch.empty_like(q[token]), torch.tensor(ends, dtype=torch.int32, device="cuda")
        gpu_attention.forward(
            q[token], pages[0], pages[1], out, None, offsets(new), 0.1, table, context, split=split
        )
        assert torch.equal(out, packed[token]), (most, split)
    table[5, :32] = table[4, :32]
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
    arguments = (pages[0], pages[1], out[:6], None, offsets([1] * 6), 0.1, table, lengths)
    alone = gpu_attention.forward(q[:6].contiguous(), *arguments).clone()
    groups = (
        torch.tensor([0, 4, 6], dtype=torch.int32, device="cuda"),
        torch.tensor([0, 512], dtype=torch.int32, device="cuda"),
    )
    of_step = (table, offsets([1] * 6), lengths, 0.1)
    assert torch.equal(ops.paged_attention(q[:6], pages[0], pages[1], *of_step), alone)
    assert torch.equal(ops.paged_attention(q[:6], pages[0], pages[1], *of_step, groups), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 65, 256])
@torch.no_grad()
def test_ops_of_one_launch_have_the_bits_of_the_single_ones(T: int, dtype: torch.dtype) -> None:
    """A decode step asks for these, training for the single ones."""
    x = randn(T, 1024, dtype=dtype)
    weights = [randn(O, 1024, dtype=dtype, seed=O) / 32 for O in (2048, 1024, 1024)]
    single = [ops.linear(x, weight) for weight in weights]
    assert all(map(torch.equal, fused.linears(x, weights, [None] * 3), single))
    assert torch.equal(fused.gate_up(x, *weights[1:], [None] * 2), ops.silu_mul(single[1], single[2]))
    q, k, v = (y.view(T, -1, 128) for y in single)
    norms = randn(128, dtype=dtype, seed=1), randn(128, dtype=dtype, seed=2)
    rotary = (*TABLES.to("cuda"), torch.arange(T, device="cuda") * 7)
    slots = torch.arange(T, device="cuda") * 3
    pages, expected = (torch.zeros(2, 16, 64, 8, 128, device="cuda", dtype=dtype) for _ in range(2))
    found = fused.rotate_write(q, k, v, norms, 1e-6, rotary, (pages[0], pages[1]), slots)
    normed = ops.rope(ops.rms_norm(q, norms[0], 1e-6), ops.rms_norm(k, norms[1], 1e-6), *rotary)
    ops.write_kv(normed[1], v, expected[0], expected[1], slots)
    assert torch.equal(found, normed[0])
    assert torch.equal(pages, expected)


def test_sample_reports_logprob_and_draws_as_on_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    z, N = 3 * torch.randn(512, 32_003, generator=generator), 512
    temperature = torch.rand(N, generator=generator) + 0.3
    temperature[::9] = 0
    args = (
        temperature,
        torch.where(torch.arange(N) % 2 == 0, 0, 40).int(),
        torch.where(torch.arange(N) % 3 == 0, 1.0, 0.9),
        torch.where(torch.arange(N) % 4 == 0, 0.05, 0.0),
        torch.arange(N),
        torch.arange(N) * 3,
    )
    token, logprob, entropy, kept, offsets = ops.sample(z.cuda(), *(x.cuda() for x in args))
    again = ops.logprob(z.cuda(), token, torch.where(temperature == 0, 1.0, temperature).cuda())
    whole = offsets.diff() == 0
    assert torch.equal(logprob[whole], again[0][whole])
    assert torch.equal(entropy[whole], again[1][whole])
    on_cpu = ops.sample(z, *args)
    assert int((token.cpu() != on_cpu[0]).sum()) <= 1  # scores within a rounding of each other
    assert float((kept.shape[0] - on_cpu[3].shape[0]) / on_cpu[3].shape[0]) < 1e-3  # so may be those at a cut
    assert backend.available() or not backend.cpp(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("max_batch", "decode_steps"), [(1, 1), (5, 8), (64, 1), (64, 8)])
def test_rollout_is_score_bit_for_bit(dtype: torch.dtype, max_batch: int, decode_steps: int) -> None:
    """Step by step, and as CUDA graphs of which eight run between two looks of the host; the memory is given
    back once."""
    from duologue.model.config import ModelConfig
    from duologue.model.decoder import Decoder, score
    from duologue.rollout.engine.engine import Engine
    from duologue.rollout.engine.sequence import SamplingParams

    config = ModelConfig(
        model_type="qwen3",
        vocab_size=1003,
        hidden_size=256,
        intermediate_size=512,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
    )
    model = Decoder(config)
    model.init_weights(0)
    model = model.to("cuda", dtype)
    rng = random.Random(1)
    prompts = [[rng.randrange(1003) for _ in range(rng.randint(1, 700))] for _ in range(12)]
    engine = Engine(
        model, max_batch=max_batch, max_step_tokens=160, cache_tokens=16_384, decode_steps=decode_steps
    )
    params = [SamplingParams(max_new_tokens=24 - i, temperature=0.9, seed=i) for i in range(12)]
    first = engine.generate(prompts, params)
    engine.release_memory()
    completions = engine.generate(prompts, params)
    assert [c.token_ids for c in completions] == [c.token_ids for c in first]
    with torch.no_grad():
        scored = score(model, [p + c.token_ids for p, c in zip(prompts, completions, strict=True)], 0.9)
    for prompt, completion, whole in zip(prompts, completions, scored, strict=True):
        assert torch.equal(torch.tensor(completion.logprobs), whole[len(prompt) - 1 :].cpu())


def test_a_pool_comes_back_to_its_address_and_is_free_in_between() -> None:
    """With the driver itself; where it refuses, that is said."""
    from duologue.rollout.engine import kv_memory

    if not kv_memory.describe(torch.device("cuda")).startswith("keeps"):
        pytest.skip(kv_memory.describe(torch.device("cuda")))
    memory = kv_memory.PoolMemory((2**30,), torch.bfloat16, torch.device("cuda"))
    before = torch.cuda.mem_get_info()[0]
    addresses = set()
    for value in (1.5, 2.5):
        pool = memory.take()
        addresses.add(pool.data_ptr())
        pool.fill_(value)
        assert float(pool[-1]) == value
        assert torch.cuda.mem_get_info()[0] < before - pool.nbytes // 2  # other processes take and give, too
        memory.give_back()
        assert torch.cuda.mem_get_info()[0] > before - pool.nbytes // 2
    assert len(addresses) == 1


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_head_with_rows_that_move(dtype: torch.dtype, exact: bool) -> None:
    """Chunks of 64 rows of which two thirds have no coefficient, against float64 of the stored logits."""
    N, H, V = 300, 256, 5003
    hidden, weight, bias = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype) / 16, randn(V, dtype=dtype)
    targets, g = torch.arange(N, device="cuda") * 13 % V, torch.linspace(-1, 1, N, device="cuda")
    g, h = g * (torch.arange(N, device="cuda") % 3 == 0), 0.1 * (torch.arange(N, device="cuda") % 5 == 0)

    def fused(x: list[Tensor]) -> list[Tensor]:
        def loss_fn(logp: Tensor, entropy: Tensor, rows: Any) -> Tensor:
            return (logp * g[rows] - entropy * h[rows]).sum()

        found = ops.linear_policy_loss(
            x[0],
            x[1],
            targets,
            loss_fn,
            temperature=0.8,
            bias=x[2],
            softcap=20.0,
            exact=exact,
            chunk_bytes=64 * V * 8,
        )
        return [found.logprob, found.entropy, *torch.autograd.grad(found.loss, x)]

    def plain(x: list[Tensor]) -> list[Tensor]:
        logits = torch.nn.functional.linear(*x)
        logits = 20 * torch.tanh((logits if logits.dtype == torch.float64 else logits.float()) / 20)
        logp, entropy = reference.logprob(logits, targets, 0.8)
        return [logp.detach(), entropy.detach(), *torch.autograd.grad((logp * g - entropy * h).sum(), x)]

    inputs = [hidden, weight, bias]
    exactly = plain([x.double().requires_grad_() for x in inputs])
    theirs = plain([x.clone().requires_grad_() for x in inputs])
    found = fused([x.clone().requires_grad_() for x in inputs])
    for i, (a, b, e) in enumerate(zip(found, theirs, exactly, strict=True)):
        floor = float(e.norm()) * (2e-6 if i < 2 else torch.finfo(dtype).eps)
        assert (
            float((a.double() - e).norm()) <= (2 if i < 2 else 3) * float((b.double() - e).norm()) + floor
        ), i


def test_fused_head_has_the_bits_of_linear_and_logprob() -> None:
    hidden, weight = randn(200, 512, dtype=torch.bfloat16), randn(3001, 512, dtype=torch.bfloat16)
    targets, heat = torch.arange(200, device="cuda") * 15, torch.full((200,), 0.9, device="cuda")
    expected = ops.logprob(ops.linear(hidden, weight, None, torch.float32), targets, heat)
    for a, b in ((0, 200), (7, 9), (30, 131)):
        found = ops.linear_logprob(hidden[a:b], weight, targets[a:b], heat[a:b], chunk_bytes=50 * 3001 * 6)
        assert all(torch.equal(x, y[a:b]) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_head_and_advantages(dtype: torch.dtype) -> None:
    N, H, V, kept = 257, 192, 4099, 9
    hidden, weight = randn(N, H, dtype=dtype), randn(V, H, dtype=dtype) / 8
    ids = (
        torch.arange(N, device="cuda")[:, None] * 11 % (V - 100) + torch.arange(kept, device="cuda") * 7
    ).int()
    offsets, targets = torch.arange(N + 1, device="cuda") * kept, ids[:, 4].long()

    def run(fn: Any, kind: torch.dtype) -> list[Tensor]:
        x, w = hidden.to(kind).requires_grad_(), weight.to(kind).requires_grad_()
        logp, entropy = fn(x, w, targets, ids.flatten(), offsets, 0.7)
        return [logp.detach(), entropy.detach(), *torch.autograd.grad((logp - entropy).sum(), (x, w))]

    exact, theirs = (
        run(lambda *a: reference.sparse_linear_logprob(*a, None, None), kind)
        for kind in (torch.float64, dtype)
    )
    for i, (a, b, e) in enumerate(zip(run(ops.sparse_linear_logprob, dtype), theirs, exact, strict=True)):
        limit = (2 if i < 2 else 3) * float((b.double() - e).norm()) + float(e.norm()) * torch.finfo(
            dtype
        ).eps
        assert float((a.double() - e).norm()) <= limit, i
    rewards, groups = randn(N), torch.arange(N, device="cuda") // 8
    scored = torch.arange(N, device="cuda") % 7 > 0
    found = ops.group_advantages(rewards, groups, scored, method="std", n_groups=33)
    on_cpu = ops.group_advantages(rewards.cpu(), groups.cpu(), scored.cpu(), method="std", n_groups=33)
    torch.testing.assert_close(found[0].cpu(), on_cpu[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1].cpu(), on_cpu[1])


def test_compiled_is_eager() -> None:
    x, weight, norm = (
        randn(64, 256, dtype=torch.bfloat16),
        randn(256, 256, dtype=torch.bfloat16),
        randn(256, dtype=torch.bfloat16),
    )
    cu = offsets([64])

    def block(x: Tensor, weight: Tensor) -> Tensor:
        y, total = ops.add_rms_norm(x, x, norm, 1e-6)
        y = ops.linear(ops.silu_mul(y, total), weight).view(64, 4, 64)
        return ops.packed_attention(y, y, y, cu, 0.1).flatten(1)

    shapes = ((64, 256), (256, 256))
    both = [
        run(fn, [x, weight], shapes, torch.bfloat16) for fn in (block, torch.compile(block, fullgraph=True))
    ]
    assert torch.equal(both[0][0], both[1][0])
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_head_and_sampler_in_one_pass() -> None:
    """The draws of stored logits but for scores within a rounding of each other; log-probs up to rounding."""
    N, H, V = 100, 512, 32_003
    hidden, weight = randn(N, H, dtype=torch.bfloat16), randn(V, H, dtype=torch.bfloat16) / 8
    ids, ones = torch.arange(N, device="cuda"), torch.ones(N, device="cuda")
    temperature = torch.where(ids % 9 == 0, 0.0, 0.8)
    settings = (temperature, (0 * ids).int(), ones, 0 * ones, ids, ids * 3)
    one = ops.linear_sample(hidden, weight, *settings, exact=False, whole=True)
    two = ops.linear_sample(hidden, weight, *settings)
    same = one[0] == two[0]
    assert int((~same).sum()) <= 1
    torch.testing.assert_close(one[1][same], two[1][same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one[2], two[2], rtol=1e-4, atol=1e-4)
