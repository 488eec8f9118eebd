"""Log-prob, entropy and sampling held to float64, the published Philox, transformers' truncation and the
multinomial."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from duologue.kernels import backend, ops, reference, softmax
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

pytestmark = pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
ISAS = [isa for isa in backend.ISAS if backend.runs(isa)]
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [(5, 1), (3, 7), (9, 127), (33, 129), (4, 4099)]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """torch's OpenMP threads spin after each call; on few cores they starve the kernels under test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    backend.use(request.param)
    yield request.param
    backend.use(os.environ.get("DUOLOGUE_CPU", ""))


def case(N: int, V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N + V)
    logits = (4 * torch.randn(N, V, generator=generator)).to(dtype)
    return logits, torch.randint(V, (N,), generator=generator), torch.rand(N, generator=generator) + 0.3


def plain_logprob(logits: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits / temperature.unsqueeze(1), -1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(-1)


def with_gradient(
    fn, logits: Tensor, targets: Tensor, temperature: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    logits = logits.to(dtype).requires_grad_()
    logprob, entropy = fn(logits, targets, temperature)
    weight = torch.linspace(-1, 1, len(logits), dtype=logprob.dtype)
    (grad,) = torch.autograd.grad((weight * logprob + weight.flip(0) * entropy).sum(), logits)
    return [logprob.detach(), entropy.detach(), grad]


# ---- log-prob ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), SHAPES)
def test_error_is_no_larger_than_torch(isa: str, dtype: torch.dtype, N: int, V: int) -> None:
    logits, targets, temperature = case(N, V, dtype)
    exact = with_gradient(plain_logprob, logits, targets, temperature.double(), torch.float64)
    theirs = with_gradient(plain_logprob, logits.float(), targets, temperature, torch.float32)
    theirs[2] = theirs[2].to(dtype)  # what autograd hands to bf16 logits
    ours = with_gradient(ops.logprob, logits, targets, temperature, dtype)
    for name, factor, a, b, c in zip(
        ("logprob", "entropy", "grad"), (2, 2, 3), ours, theirs, exact, strict=True
    ):
        rounding = 2.0**-24 * c.norm()  # torch may be lucky on a few short rows
        assert (a - c).norm() <= factor * torch.maximum((b - c).norm(), rounding), name
    assert ours[2].dtype == dtype


def test_reference_and_float64_gradient() -> None:
    logits, targets, temperature = case(4, 7, torch.float64)
    torch.testing.assert_close(
        reference.logprob(logits, targets, temperature.double()),
        plain_logprob(logits, targets, temperature.double()),
    )
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: reference.logprob(z, targets, 0.7), logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_keeps_its_bits_in_any_company(isa: str, dtype: torch.dtype) -> None:
    logits, targets, temperature = case(33, 129, dtype)
    together = with_gradient(ops.logprob, logits, targets, temperature, dtype)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    shuffled = ops.logprob(logits[order], targets[order], temperature[order])
    assert torch.equal(shuffled[0], together[0][order])
    assert torch.equal(shuffled[1], together[1][order])
    before = backend.lib().threads()
    try:
        for threads in (1, 3):
            backend.lib().set_threads(threads)
            again = with_gradient(ops.logprob, logits, targets, temperature, dtype)
            assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    finally:
        backend.lib().set_threads(before)


def test_temperature_is_a_number_or_one_per_row() -> None:
    logits, targets, _ = case(9, 127, torch.float32)
    by_row = with_gradient(ops.logprob, logits, targets, torch.full((9,), 0.7), torch.float32)
    by_number = with_gradient(
        lambda z, t, _: ops.logprob(z, t, 0.7), logits, targets, torch.empty(0), torch.float32
    )
    assert all(torch.equal(a, b) for a, b in zip(by_row, by_number, strict=True))


def test_impossible_tokens_count_as_nothing(isa: str) -> None:
    logits, _, _ = case(9, 127, torch.float32)
    allowed = torch.arange(0, 127, 3)
    masked = torch.full_like(logits, float("-inf")).index_copy(1, allowed, logits[:, allowed])
    targets = allowed[torch.arange(9)]
    exact = with_gradient(
        plain_logprob, logits[:, allowed].double(), torch.arange(9), torch.ones(9), torch.float64
    )
    ours = with_gradient(ops.logprob, masked, targets, torch.ones(9), torch.float32)
    for a, b in zip((*ours[:2], ours[2][:, allowed]), exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=3e-6)
    assert ours[2].count_nonzero() == ours[2][:, allowed].count_nonzero()
    token = ops.sample(masked, *settings(9))[0]
    assert bool((token % 3 == 0).all())


# ---- sampling ----------------------------------------------------------------------------------------------


def settings(
    n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 5
) -> tuple[Tensor, ...]:
    """The arguments of `sample` after the logits: n draws at positions 0 to n - 1 of one seed."""
    full = [torch.full((n,), x) for x in (temperature, top_p, min_p)]
    ids = torch.arange(n)
    return (
        full[0],
        torch.full((n,), top_k, dtype=torch.int32),
        full[1],
        full[2],
        torch.full_like(ids, seed),
        ids,
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))  # of Random123
    assert tuple(int(w) for w in words) == expected


def test_uniforms_are_the_reference_bit_for_bit(isa: str) -> None:
    seed = torch.tensor([0, 1, -7, 2**62 + 12345, -(2**63)])
    position = torch.tensor([0, 2**33 + 5, -1, 77, 2**63 - 1])
    for V in (1, 7, 129, 1000):
        out = torch.empty(5, V)
        backend.lib().uniforms(seed.data_ptr(), position.data_ptr(), out.data_ptr(), 5, V)
        assert torch.equal(out, reference.uniforms(seed, position, V))
        assert 0 < out.min() <= out.max() < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sample_is_the_reference(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    logits, _, temperature = case(300, 331, dtype)
    temperature[::5] = 0
    top_k = torch.randint(0, 20, (300,), generator=generator).int() * (torch.arange(300) % 2).int()
    top_p = torch.where(torch.arange(300) % 3 == 0, 1.0, torch.rand(300, generator=generator))
    min_p = torch.where(torch.arange(300) % 4 == 0, 0.1 * torch.rand(300, generator=generator), 0.0)
    seed = torch.randint(-(2**62), 2**62, (300,), generator=generator)
    position = torch.randint(2**40, (300,), generator=generator)
    args = (temperature, top_k, top_p, min_p, seed, position)
    token, logprob, entropy, kept_ids, kept_offsets = ops.sample(logits, *args)
    expected = reference.sample(logits, *args)
    assert torch.equal(token, expected[0])
    torch.testing.assert_close((logprob, entropy), expected[1:3], rtol=1e-5, atol=1e-5)
    assert torch.equal(kept_ids, expected[3])
    assert torch.equal(kept_offsets, expected[4])
    of_logprob = ops.logprob(logits, token, torch.where(temperature == 0, 1.0, temperature))
    whole = kept_offsets.diff() == 0
    assert 0 < int(whole.sum()) < 300
    assert torch.equal(logprob[whole], of_logprob[0][whole])
    assert torch.equal(entropy[whole], of_logprob[1][whole])


def test_a_draw_depends_on_its_row_alone(isa: str) -> None:
    logits, _, _ = case(40, 129, torch.float32)
    args = settings(40, top_p=0.9)
    together = ops.sample(logits, *args)[:3]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for index in (order, order[:1], order[7:20]):
        part = ops.sample(logits[index], *(x[index] for x in args))[:3]
        assert all(torch.equal(a, b[index]) for a, b in zip(part, together, strict=True))


@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 0.5), (0.7, 2.0), (1.5, 5.0)])
def test_frequencies_are_the_softmax(isa: str, temperature: float, spread: float) -> None:
    """Pearson's statistic of 40,000 draws: its mean is the degrees of freedom, its variance twice that."""
    draws, V = 40_000, 61
    row = spread * torch.randn(V, generator=torch.Generator().manual_seed(1))
    expected = draws * torch.softmax(row.double() / temperature, -1)
    rows = row.expand(draws, V)
    along_positions = settings(draws, temperature)
    along_seeds = (*along_positions[:4], torch.arange(draws), torch.full((draws,), 3))
    for args in (along_positions, along_seeds):
        counts = torch.bincount(ops.sample(rows, *args)[0], minlength=V).double()
        rare = expected < 10  # pooled: Pearson's statistic needs some draws in each cell
        observed = torch.cat((counts[~rare], counts[rare].sum().view(1)))
        wanted = torch.cat((expected[~rare], expected[rare].sum().clamp(min=1e-9).view(1)))
        freedom = len(wanted) - 1
        assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_rare_tokens_win_as_often_as_they_should(isa: str) -> None:
    draws, V, share = 4_000, 3_001, 0.02  # 3,000 tokens of 7e-6 each beside one: most noise is skipped unseen
    row = torch.full((V,), float(torch.tensor(share / (1 - share) / (V - 1)).log()))
    row[V // 2] = 0.0
    token = ops.sample(row.expand(draws, V), *settings(draws))[0]
    rare = token[token != V // 2]
    assert abs(len(rare) - draws * share) < 5 * (draws * share) ** 0.5
    assert abs(float(rare.float().mean()) - V / 2) < 5 * V / (12 * len(rare)) ** 0.5


def transformers_keeps(scaled: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(scaled), 1, dtype=torch.int64), scaled).isfinite()


TRUNCATIONS = [
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (0, 0.5, 0.0),
    (0, 0.95, 0.0),
    (0, 1.0, 0.1),
    (20, 0.8, 0.02),
    (3, 0.99, 0.3),
    (500, 0.0, 0.0),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), TRUNCATIONS)
def test_kept_sets_are_those_of_transformers(top_k: int, top_p: float, min_p: float) -> None:
    temperature, draws, V = 0.8, 600, 40
    rows = 2 * torch.randn(8, V, generator=torch.Generator().manual_seed(2))
    kept = transformers_keeps(rows / temperature, top_k, top_p, min_p)
    full = [torch.full((8,), x) for x in (top_k, top_p, min_p)]
    assert torch.equal(reference.keep_mask(rows / temperature, *full), kept)
    for row, keeps in zip(rows, kept, strict=True):
        seen = torch.zeros(V, dtype=torch.bool)
        seen[ops.sample(row.expand(draws, V), *settings(draws, temperature, top_k, top_p, min_p))[0]] = True
        assert not bool((seen & ~keeps).any())
        likely = keeps & (
            torch.softmax(row / temperature, -1) > 0.02
        )  # missing one of these has odds below 1e-5
        assert bool(seen[likely].all())


def test_ties_at_the_cut_stay_together() -> None:
    row = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0, 2.0])
    kept = transformers_keeps(row.unsqueeze(0), 2, 1.0, 0.0)[0]
    for top_k, top_p in ((2, 1.0), (0, 0.6)):  # the largest has 0.48, each of the three next 0.18
        token = ops.sample(row.expand(400, 6), *settings(400, top_k=top_k, top_p=top_p))[0]
        assert token.unique().tolist() == kept.nonzero().flatten().tolist() == [1, 2, 3, 5]


def test_greedy_takes_the_first_of_the_largest(isa: str) -> None:
    logits = torch.zeros(3, 200)
    logits[0, [150, 70]] = 2.0
    logits[1, 199] = 1.0
    token, logprob, entropy, *_ = ops.sample(logits, *settings(3, temperature=0.0, top_p=0.5))
    assert token.tolist() == [70, 199, 0]
    assert torch.equal(torch.stack((logprob, entropy)), torch.stack(ops.logprob(logits, token, 1.0)))


# ---- contracts ---------------------------------------------------------------------------------------------


def test_library_ops_are_sound() -> None:
    logits, targets, temperature = case(3, 7, torch.float32)
    logits.requires_grad_()
    for temperatures, number in ((temperature, 1.0), (None, 0.7)):
        torch.library.opcheck(torch.ops.duologue.logprob.default, (logits, targets, temperatures, number))
    torch.library.opcheck(softmax.sample_op, (logits.detach(), *settings(3)))


def test_compiled_is_eager() -> None:
    logits, targets, temperature = case(9, 127, torch.float32)
    args = settings(9)

    def both(z: Tensor, targets: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        _, logprob, entropy, _, _ = ops.sample(z.detach(), *args)
        return tuple(
            a + b for a, b in zip(ops.logprob(z, targets, temperature), (logprob, entropy), strict=True)
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradient(both, logits, targets, temperature, torch.float32),
        with_gradient(compiled, logits, targets, temperature, torch.float32),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_rows() -> None:
    assert ops.logprob(torch.empty(0, 5), torch.empty(0, dtype=torch.int64))[0].shape == (0,)
    assert ops.sample(torch.empty(0, 5), *settings(0))[0].shape == (0,)


@pytest.mark.parametrize(
    ("targets", "temperature", "message"),
    [
        (torch.tensor([0, 7]), 1.0, "row 1 has target 7 .* accepted is 0 to 6"),
        (torch.tensor([-1, 0]), 1.0, "row 0 has target -1"),
        (torch.tensor([0, 1]), 0.0, "temperature 0.0, .* above 0"),
        (torch.tensor([0, 1]), torch.tensor([1.0, -2.0]), "row 1 .* temperature -2.0"),
        (torch.tensor([0, 1]), torch.tensor([1.0]), r"temperature has shape \(1,\)"),
        (torch.tensor([0, 1], dtype=torch.int32), 1.0, "targets is torch.int32, accepted is torch.int64"),
        (torch.tensor([0]), 1.0, r"targets has shape \(1,\), accepted is \(2\)"),
    ],
)
def test_logprob_refuses(targets: Tensor, temperature: float | Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.logprob(torch.zeros(2, 7), targets, temperature)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0.*from 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 1.5}, "top_p = 1.5.*from 0 to 1"),
        ({"min_p": -0.1}, "min_p = -0.1"),
    ],
)
def test_sample_refuses(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sample(torch.zeros(2, 7), *settings(2, **setting))
    with pytest.raises(ValueError, match="empty vocabulary"):
        ops.sample(torch.zeros(2, 0), *settings(2))
