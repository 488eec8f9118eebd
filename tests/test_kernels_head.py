"""The fused head against float64 PyTorch autograd, and every form of the loss through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from duologue.grpo.loss import LossConfig, Normaliser, policy_loss
from duologue.kernels import backend, head, ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CASES = [
    (1, 8, 7),
    (7, 16, 129),
    (127, 33, 1000),
    (129, 64, 8191),
    (5, 16, 50257),
    (3, 8, 151936),
    (64, 48, 4096),
]  # N, H, V


def inputs(N: int, H: int, V: int, dtype: torch.dtype, bias: bool = False, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    made = {
        "hidden": torch.randn(N, H, generator=g).to(dtype),
        "weight": (torch.randn(V, H, generator=g) * 2 * H**-0.5).to(dtype),
        "bias": torch.randn(V, generator=g).to(dtype) if bias else None,
    }
    return {k: None if v is None else v.requires_grad_() for k, v in made.items()} | {
        "targets": torch.randint(0, V, (N,), generator=g)
    }


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Any,
    bias: Tensor | None,
    softcap: float | None,
) -> Any:
    """Log-prob and entropy by PyTorch, in the dtype of hidden up to the logits, then at least fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = (
        logits / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)
    ).log_softmax(-1)
    return logp.gather(1, targets.unsqueeze(1)).squeeze(1), -(logp.exp() * logp).sum(1)


def grads(x: dict[str, Any], loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [x[k] for k in ("hidden", "weight", "bias") if x[k] is not None]))


def doubled(x: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v if v is None or k == "targets" else v.detach().double().requires_grad_() for k, v in x.items()
    }


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extra", ["", "bias", "softcap", "temperatures"])
@pytest.mark.parametrize(("N", "H", "V"), CASES)
def test_no_less_accurate_than_pytorch(N: int, H: int, V: int, extra: str, dtype: torch.dtype) -> None:
    if extra and V > 10_000:
        pytest.skip("the large vocabularies are covered without extras")
    x = inputs(N, H, V, dtype, bias=extra == "bias")
    temperature: Any = torch.linspace(0.5, 1.5, N) if extra == "temperatures" else 0.8
    softcap = 3.0 if extra == "softcap" else None
    weights = torch.linspace(-1, 1, N), torch.linspace(0.3, -0.2, N)
    results = []
    for fn, y in (
        (
            lambda y: ops.linear_logprob(
                **y, temperature=temperature, softcap=softcap, chunk_bytes=16 * V * 4
            ),
            x,
        ),
        (lambda y: plain(**y, temperature=temperature, softcap=softcap), x),
        (lambda y: plain(**y, temperature=temperature, softcap=softcap), doubled(x)),
    ):
        logp, entropy = fn(y)
        loss = (logp * weights[0].to(logp.dtype)).sum() + (entropy * weights[1].to(logp.dtype)).sum()
        results.append([logp.detach(), entropy.detach(), *grads(y, loss)])
    ours, theirs, exact = results
    floor = 2e-6 if dtype == torch.float32 else 1e-3
    for i, (a, b, c) in enumerate(zip(ours, theirs, exact, strict=True)):
        assert error(a, c) <= max((2 if i < 2 else 3) * error(b, c), floor), i


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_linear_and_logprob_in_any_batch(dtype: torch.dtype) -> None:
    x = inputs(129, 48, 1000, dtype)
    with torch.no_grad():
        expected = ops.logprob(ops.linear(x["hidden"], x["weight"], None, torch.float32), x["targets"], 0.9)
        for rows in (slice(0, 129), slice(3, 4), slice(17, 50)):
            got = ops.linear_logprob(
                x["hidden"][rows], x["weight"], x["targets"][rows], 0.9, chunk_bytes=7 * 4000
            )
            assert all(torch.equal(a, b[rows]) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("mask", [None, torch.arange(7) % 3 > 0])
def test_float64_gradient_is_that_of_differences(mask: Tensor | None) -> None:
    """No kernel takes float64: the definition has the gradient of every form too."""
    x = doubled(inputs(7, 3, 5, torch.float32, bias=True))

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        rest = {"bias": bias, "softcap": 3.0, "mask": mask, "chunk_bytes": 3 * 5 * 20}
        return ops.linear_logprob(hidden, weight, x["targets"], 0.7, **rest)

    assert torch.autograd.gradcheck(call, (x["hidden"], x["weight"], x["bias"]))


def test_masked_rows_return_zero_and_get_no_gradient() -> None:
    x = inputs(40, 16, 300, torch.float32)
    mask = torch.arange(40) % 3 > 0
    x["hidden"].data[~mask] = float("nan")  # would spoil any product that they entered
    logp, entropy = ops.linear_logprob(**x, mask=mask)
    kept = {**x, "hidden": x["hidden"].detach()[mask].requires_grad_(), "targets": x["targets"][mask]}
    expected = ops.linear_logprob(**kept)
    assert torch.equal(logp[mask], expected[0])
    assert torch.equal(entropy[mask], expected[1])
    assert not logp[~mask].any()
    got, want = grads(x, logp.sum()), grads(kept, expected[0].sum())
    assert torch.equal(got[0][mask], want[0])
    assert not got[0][~mask].any()
    assert error(got[1], want[1].double()) < 1e-6  # the rows are summed in another order


KL = [("none", 0.0), ("k1", 0.1), ("k2", 0.1), ("k3", 0.1)]
CLIPS: list[dict[str, float]] = [{}, {"clip_high": 0.4}, {"dual_clip": 1.5}]


@pytest.mark.parametrize("variant", ["dapo", "grpo", "bnpo", "dr_grpo", "gspo", "cispo"])
def test_every_loss_has_its_autograd_gradient(variant: str) -> None:
    """variant x KL x clip x entropy bonus x importance weights, in float64 and fp32, against autograd of the
    plain composition."""
    N, H, V, S = 23, 6, 11, 4
    g = torch.Generator().manual_seed(1)
    segments = torch.sort(torch.randint(0, S, (N,), generator=g)).values
    advantage = torch.randn(S, generator=g).double()[segments]
    advantage[segments == 1] = 0.0
    total = Normaliser(tokens=float(N), rows=float(S), max_length=20.0)
    for (estimator, kl), clip, bonus, tis in itertools.product(KL, CLIPS, (0.0, 0.05), (0.0, 1.2)):
        config = LossConfig(
            variant=variant,
            kl_coef=kl,
            kl_estimator=estimator if kl else "k3",
            entropy_coef=bonus,
            tis_cap=tis,
            **clip,
        )
        x = doubled(inputs(N, H, V, torch.float32))
        logp, _ = plain(**x, temperature=0.7, softcap=None)
        old, ref, sampler = (logp.detach() + 0.3 * torch.randn(N, generator=g).double() for _ in range(3))

        def loss_fn(
            logp: Tensor,
            entropy: Tensor,
            rows: slice,
            config: LossConfig = config,
            old: Tensor = old,
            ref: Tensor = ref,
            sampler: Tensor = sampler,
        ) -> Tensor:
            d = logp.dtype
            return policy_loss(
                config,
                logp,
                old[rows].to(d),
                advantage[rows].to(d),
                segments[rows],
                S,
                total,
                ref_logp=ref[rows].to(d),
                entropy=entropy,
                sampler_logp=sampler[rows].to(d),
            )[0]

        exact = loss_fn(*plain(**x, temperature=0.7, softcap=None), slice(0, N))
        expected = grads(x, exact)
        coupled = variant in ("grpo", "gspo")  # their weights need the length of whole rows
        single = {
            k: v.detach().float().requires_grad_() if k in ("hidden", "weight") else v for k, v in x.items()
        }
        for y, tolerance in ((x, 1e-11), (single, 2e-4)):
            loss = ops.linear_policy_loss(
                **y,
                loss_fn=loss_fn,
                temperature=0.7,
                level="sequence" if coupled else "token",
                chunk_bytes=5 * V * 8,
            ).loss
            assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-4, abs=1e-6)
            for a, b in zip(grads(y, loss * 2.5), expected, strict=True):
                assert error(a, 2.5 * b) < tolerance, config


def test_rows_without_a_coefficient_change_nothing() -> None:
    """Most advantages zero: the rest is compacted, and the gradients are those of the rest alone."""
    x = inputs(64, 16, 500, torch.float32)
    weight = torch.where(torch.arange(64) % 5 == 0, 1.0, 0.0)

    def loss_fn(logp: Tensor, entropy: Tensor, rows: slice) -> Tensor:
        return (logp * weight[rows]).sum()

    got = grads(x, ops.linear_policy_loss(**x, loss_fn=loss_fn).loss)
    expected = grads(x, (ops.linear_logprob(**x)[0] * weight).sum())
    assert error(got[0], expected[0].double()) < 1e-6
    assert error(got[1], expected[1].double()) < 1e-6
    assert not got[0][weight == 0].any()


def test_compaction_moves_only_into_gaps() -> None:
    """Every active row once, in the first k places; a place that is written with another row is the source of
    none."""
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 7, 64):
        for share in (0.0, 0.2, 0.5, 0.9, 1.0):
            active = torch.rand(n, generator=g) < share
            moved = head.Compaction(active)
            k = moved.count()
            assert k == int(active.sum())
            source = moved.from_row[:k]
            assert sorted(source.tolist()) == active.nonzero()[:, 0].tolist()
            assert (moved.from_row[k:] == -1).all()
            elsewhere = source != torch.arange(k)
            assert not active[:k][elsewhere].any()


def test_compaction_is_as_drawn() -> None:
    moved = head.Compaction(torch.tensor([False, True, False, True, True]))
    assert moved.from_row.tolist() == [3, 1, 4, -1, -1]
    assert moved.count() == 3


def test_library_checks_and_compile() -> None:
    x = inputs(9, 16, 50, torch.float32, bias=True)
    op = torch.ops.duologue.linear_logprob.default
    torch.library.opcheck(
        op, (x["hidden"], x["weight"], x["targets"], torch.full((9,), 0.9), x["bias"], 2.0, None, True, 4000)
    )
    mask = torch.arange(9) % 2 > 0
    torch.library.opcheck(
        op, (x["hidden"], x["weight"], x["targets"], torch.full((9,), 0.5), None, 0.0, mask, True, 600)
    )

    def run(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        logp, entropy = ops.linear_logprob(hidden, weight, targets, 0.9, bias)
        return (logp - 0.1 * entropy).sum()

    y = dict(x)

    def policy(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return ops.linear_policy_loss(
            hidden, weight, targets, lambda logp, entropy, rows: (logp - 0.1 * entropy).sum(), bias=bias
        ).loss

    one, other = (
        grads(x, policy(**x)),
        grads(y, torch.compile(policy, fullgraph=True, backend="aot_eager")(**y)),
    )
    assert all(error(a, b.double()) < 1e-6 for a, b in zip(one, other, strict=True))
    eager = grads(x, run(**x))
    compiled = grads(y, torch.compile(run, fullgraph=True, backend="aot_eager")(**y))
    assert all(map(torch.equal, eager, compiled))

    def masked(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        loss = lambda logp, entropy, rows: (logp - 0.1 * entropy).sum()  # noqa: E731
        return ops.linear_policy_loss(hidden, weight, targets, loss, bias=bias, mask=mask).loss

    eager = grads(x, masked(**x))  # in chunks, outside of the graph
    compiled = grads(y, torch.compile(masked, backend="aot_eager")(**y))
    assert all(map(torch.equal, eager, compiled))


def _good() -> dict[str, Any]:
    return {
        k: v.detach() if isinstance(v, Tensor) else v
        for k, v in inputs(6, 8, 20, torch.float32, bias=True).items()
    }


BAD: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("hidden", lambda x: x["hidden"].flatten(), "hidden has shape .*accepted is"),
    ("hidden", lambda x: x["hidden"].long(), "hidden is torch.int64, accepted is one of torch.float32"),
    ("weight", lambda x: x["weight"][:, :5], r"weight has shape \(20, 5\), accepted is \(\*, 8\)"),
    ("weight", lambda x: x["weight"][:0], "weight has 0 rows"),
    ("weight", lambda x: x["weight"].bfloat16(), "weight is torch.bfloat16, accepted is torch.float32"),
    ("weight", lambda x: x["weight"].to("meta"), "weight is on meta, but the other arguments are on cpu"),
    ("targets", lambda x: x["targets"].int(), "targets is torch.int32, accepted is torch.int64"),
    ("targets", lambda x: x["targets"][:3], r"targets has shape \(3,\), accepted is \(6\)"),
    ("targets", lambda x: x["targets"] + 20, r"row 0 has target \d+ .*accepted is 0 to 19"),
    ("targets", lambda x: x["targets"] - 30, r"has target -\d+ .*accepted is 0 to 19"),
    ("bias", lambda x: x["bias"][:4], r"bias has shape \(4,\), accepted is \(20\)"),
    ("temperature", lambda x: 0.0, "temperature = 0.0, accepted is a finite number above 0"),
    ("temperature", lambda x: torch.tensor([1.0, 1, 1, -1, 1, 1]), "row 3 has target .* temperature -1"),
    ("temperature", lambda x: torch.ones(3), "temperature has shape"),
    ("softcap", lambda x: -1.0, "softcap = -1.0"),
]


@pytest.mark.parametrize(("name", "make", "message"), BAD)
def test_bad_input_is_named(name: str, make: Callable[[dict[str, Any]], Any], message: str) -> None:
    x = _good()
    bad = {**x, name: make(x)}
    with pytest.raises(ValueError, match=message):
        ops.linear_logprob(**bad)
    with pytest.raises(ValueError, match=message):
        ops.linear_policy_loss(**bad, loss_fn=lambda logp, *_: logp.sum())


def test_bad_mask_level_and_loss_are_named() -> None:
    x = _good()
    with pytest.raises(ValueError, match="mask has shape"):
        ops.linear_logprob(**x, mask=torch.ones(4))
    with pytest.raises(ValueError, match="level = 'row'"):
        ops.linear_policy_loss(**x, loss_fn=lambda logp, *_: logp.sum(), level="row")
    with pytest.raises(ValueError, match="returned shape"):
        ops.linear_policy_loss(**x, loss_fn=lambda logp, *_: logp)


def test_no_rows() -> None:
    x = inputs(0, 8, 20, torch.float32)
    logp, entropy = ops.linear_logprob(**x)
    assert logp.shape == entropy.shape == (0,)
    assert not grads(x, logp.sum())[1].any()
    assert float(ops.linear_policy_loss(**x, loss_fn=lambda logp, *_: logp.sum()).loss.detach()) == 0


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 9),
    H=st.integers(1, 9),
    V=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int32]),
    wdtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tdtype=st.sampled_from([torch.int64, torch.int32, torch.float32]),
    low=st.integers(-1, 3),
    off=st.integers(0, 2),
    stride=st.booleans(),
    budget=st.integers(1, 500),
)
def test_fuzzed_arguments_work_or_are_refused(
    N: int,
    H: int,
    V: int,
    dtype: Any,
    wdtype: Any,
    tdtype: Any,
    low: int,
    off: int,
    stride: bool,
    budget: int,
) -> None:
    hidden = torch.ones(N, H).to(dtype)
    weight = torch.ones(V, H + off).to(wdtype)
    weight = weight.t().contiguous().t() if stride else weight
    targets = (torch.arange(N) % V + low).to(tdtype)
    try:
        logp, entropy = ops.linear_logprob(hidden, weight, targets, chunk_bytes=budget)
    except ValueError as error:
        if "accepted is" not in str(error):
            raise
        return
    assert off == 0
    assert tdtype == torch.int64
    assert torch.allclose(entropy.float(), torch.full((N,), V).float().log(), atol=1e-3)
    assert torch.allclose(logp, -entropy, atol=1e-3)


GB = 10**9


@pytest.mark.parametrize(
    ("total", "gib"), [(141 * GB, 8), (192 * GB, 8), (80 * GB, 4), (48 * GB, 2), (24 * GB, 1), (2 * GB, 0.25)]
)
def test_on_a_gpu_a_chunk_goes_by_the_memory_that_the_device_has(
    total: int, gib: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power of two, so that devices of a kind agree; what is free is not asked for."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: pytest.fail("bits would depend on it"))
    asked: list[Any] = []

    def properties(device: Any) -> Any:
        asked.append(device)
        return SimpleNamespace(total_memory=total)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    one = SimpleNamespace(softcap=0.0, chunk_bytes=0)
    V = 151_936
    work: Any = SimpleNamespace(library="triton", in_place=False, inputs=one, V=V, N=10**6)
    work.hidden = SimpleNamespace(device=torch.device("cuda", 1))
    rows = head.Head._rows_of_a_chunk(work)
    assert rows == int(gib * 2**30) // (V * 6)
    assert asked == [torch.device("cuda", 1)]
    work.N = 100
    assert head.Head._rows_of_a_chunk(work) == 100


def token_loss(logp: Tensor, entropy: Tensor, rows: Any) -> Tensor:
    return (logp * torch.linspace(-1, 1, 6)[rows] - 0.1 * entropy).sum()


@pytest.mark.parametrize("op", ["logprob", "loss"])
def test_temperatures_may_be_a_column_or_one_number_over_again(op: str) -> None:
    """Of any strides: what is read is each row's own."""

    def found(temperature: Any) -> list[Tensor]:
        x = inputs(6, 8, 29, torch.float32)
        of_head = x["hidden"], x["weight"], x["targets"]
        if op == "logprob":
            logp, entropy = ops.linear_logprob(*of_head, temperature)
            return [logp, entropy, *grads(x, token_loss(logp, entropy, slice(None)))]
        made = ops.linear_policy_loss(*of_head, token_loss, temperature=temperature)
        return [made.logprob, made.entropy, *grads(x, made.loss)]

    expected = found(0.7)
    beside = torch.stack([torch.full((6,), 0.7), torch.full((6,), 9.0)], 1)
    for temperature in (beside[:, 0], torch.tensor(0.7).expand(6)):
        assert all(torch.equal(a, b) for a, b in zip(found(temperature), expected, strict=True))


def test_a_loss_scale_keeps_what_is_small_in_fp16() -> None:
    x = inputs(64, 32, 2000, torch.float16)
    of_head = x["hidden"], x["weight"], x["targets"]
    made = ops.linear_policy_loss(*of_head, lambda logp, entropy, rows: -(logp.sum() / 65536))
    found = grads(x, made.loss * 65536)
    wide = doubled(x)
    logp, _ = plain(wide["hidden"], wide["weight"], x["targets"], 1.0, None, None)
    for got, exact in zip(found, grads(wide, -logp.sum()), strict=True):
        assert got.dtype == torch.float16
        assert error(got, exact) < 1e-3
        assert float((got == 0).double().mean()) < 0.01


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head.Head, "gradient", None)
    x = inputs(6, 8, 29, torch.float32)
    for level in ("token", "sequence"):
        with torch.no_grad():
            made = ops.linear_policy_loss(
                x["hidden"], x["weight"], x["targets"], token_loss, level=level, chunk_bytes=300
            )
        assert not made.loss.requires_grad
    with pytest.raises(TypeError, match="NoneType"):
        ops.linear_policy_loss(x["hidden"], x["weight"], x["targets"], token_loss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32])
def test_a_forbidden_part_of_the_vocabulary_counts_as_nothing(dtype: torch.dtype) -> None:
    """Its logits are -inf; the definition, which serves float64 and fp16 on a CPU, has no NaN either."""
    x = inputs(6, 8, 29, dtype, bias=True)
    x["targets"] %= 20
    with torch.no_grad():
        x["bias"][20:] = -torch.inf
    made = ops.linear_policy_loss(
        x["hidden"], x["weight"], x["targets"], lambda logp, entropy, rows: -logp.sum(), bias=x["bias"]
    )
    found = grads(x, made.loss)
    kept = {k: v if v is None or k in ("hidden", "targets") else v[:20] for k, v in doubled(x).items()}
    logp, entropy = plain(kept["hidden"], kept["weight"], x["targets"], 1.0, kept["bias"], None)
    tolerance = 1e-2 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(made.logprob.double(), logp.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(made.entropy.double(), entropy.detach(), rtol=tolerance, atol=tolerance)
    exact = torch.autograd.grad(-logp.sum(), [kept["hidden"], kept["weight"]])
    assert error(found[0], exact[0]) < tolerance
    assert error(found[1][:20], exact[1]) < tolerance
    assert not found[1][20:].any()
    settings_of_draws = [torch.ones(6), torch.zeros(6).int(), torch.ones(6), torch.zeros(6)]
    places = torch.arange(6)
    logits = (x["hidden"] @ x["weight"].T + x["bias"]).detach()
    entropies = ops.sample(logits, *settings_of_draws, places, places)[2]
    torch.testing.assert_close(entropies.double(), entropy.detach(), rtol=tolerance, atol=tolerance)
