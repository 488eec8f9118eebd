"""grpo/loss.py against TRL's own `_compute_loss`, finite differences, and the properties that splitting
relies on.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from duologue.grpo.imitation import imitation_loss
from duologue.grpo.loss import (
    KL_ESTIMATORS,
    VARIANTS,
    LossConfig,
    Normaliser,
    kl_estimate,
    policy_loss,
)
from torch import Tensor

S, L, MAX_LENGTH = 5, 7, 11
LENGTHS = torch.tensor([7, 1, 4, 6, 3])
SEGMENTS = torch.arange(S).repeat_interleave(LENGTHS)
TOTAL = Normaliser(tokens=float(LENGTHS.sum()), rows=float(S), max_length=MAX_LENGTH)


def make_case(seed: int = 0, spread: float = 0.5, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    """Random padded [S, L] tensors, as TRL takes them; `spread` sets how far the ratios are from 1."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    logp = -draw(S, L).abs() - 0.1
    return SimpleNamespace(
        mask=torch.arange(L) < LENGTHS[:, None],
        logp=logp,
        old=logp + draw(S, L, scale=spread),
        behaviour=logp + draw(S, L, scale=spread),
        ref=logp + draw(S, L, scale=spread),
        entropy=draw(S, L).abs(),
        advantages=draw(S),
    )


def our_loss(
    config: LossConfig, case: SimpleNamespace, logp: Tensor, entropy: Tensor | None = None
) -> Tensor:
    """The same numbers as packed vectors."""
    m = case.mask
    loss, _ = policy_loss(
        config,
        logp[m],
        case.old[m],
        case.advantages[SEGMENTS],
        SEGMENTS,
        S,
        TOTAL,
        ref_logp=case.ref[m],
        entropy=(case.entropy if entropy is None else entropy)[m],
        sampler_logp=case.behaviour[m],
    )
    return loss


def trl_loss(config: LossConfig, case: SimpleNamespace, logp: Tensor, entropy: Tensor) -> Tensor:
    """`GRPOTrainer._compute_loss` itself on an instance that has only what that method reads."""
    trl = pytest.importorskip("trl", reason="trl is a development dependency")
    trainer = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    cispo = config.variant == "cispo"
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, entropy, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if config.variant == "gspo" else "token",
        beta=config.kl_coef,
        args=SimpleNamespace(
            use_bias_correction_kl=False,
            delta=config.dual_clip or None,
            steps_per_generation=1,
            entropy_target=None,
        ),
        loss_type="grpo" if config.variant == "gspo" else config.variant,
        epsilon_low=config.clip_low,
        epsilon_high=1 + config.clip_high if cispo else config.clip_high,
        use_vllm=config.tis_cap > 0,
        vllm_importance_sampling_correction=True,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_LENGTH,
        _entropy_bonus_enabled=config.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=config.entropy_coef,
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        _metrics={"train": {name: [] for name in TRL_METRICS}},
    )
    ratio = ((case.old - case.behaviour) * case.mask).exp().clamp(max=config.tis_cap or 1e9)
    inputs = {
        "prompt_ids": torch.zeros(S, 2, dtype=torch.long),
        "prompt_mask": torch.ones(S, 2, dtype=torch.long),
        "completion_ids": torch.zeros(S, L, dtype=torch.long),
        "completion_mask": case.mask.long(),
        "advantages": case.advantages,
        "old_per_token_logps": case.old,
        "ref_per_token_logps": case.ref,
        "importance_sampling_ratio": ratio,
        "num_items_in_batch": case.mask.sum(),
    }
    return trainer._compute_loss(trainer.model, inputs)


TRL_METRICS = ["kl", "entropy", "policy_loss", "entropy_coef", "cispo_clip_ratio"] + [
    f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
]
OPTIONS = {
    "plain": {},
    "clip_high": {"clip_low": 0.1, "clip_high": 0.28},
    "dual": {"dual_clip": 1.6},
    "kl": {"kl_coef": 0.04},
    "entropy": {"entropy_coef": 0.01},
    "tis": {"tis_cap": 1.2},
    "all": {"clip_high": 0.28, "dual_clip": 1.5, "kl_coef": 0.1, "entropy_coef": 0.02, "tis_cap": 1.1},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_value_and_gradient_equal_trl(variant: str, option: str) -> None:
    settings = dict(OPTIONS[option])
    if variant == "cispo":
        settings.pop("dual_clip", None)
    config = LossConfig(variant=variant, **settings)
    for seed, spread in ((0, 0.5), (1, 0.05)):
        case = make_case(seed, spread)
        results = []
        for loss_of in (our_loss, trl_loss):
            logp, entropy = case.logp.clone().requires_grad_(), case.entropy.clone().requires_grad_()
            loss = loss_of(config, case, logp, entropy)
            wrt_entropy = config.entropy_coef != 0
            grads = torch.autograd.grad(loss, (logp, entropy) if wrt_entropy else (logp,))
            assert grads[0].abs().sum() > 1e-6
            results.append((loss, *(torch.where(case.mask, grad, 0) for grad in grads)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "cispo"])
def test_gradcheck(variant: str, estimator: str) -> None:
    options = {"clip_high": 0.28, "dual_clip": 1.4, "kl_coef": 0.3, "entropy_coef": 0.1, "tis_cap": 1.3}
    config = LossConfig(variant=variant, kl_estimator=estimator, **options)
    case = make_case(2)
    m = case.mask

    def loss_of(logp: Tensor, entropy: Tensor) -> Tensor:
        padded = torch.zeros(S, L, dtype=torch.float64).masked_scatter(m, logp)
        return our_loss(config, case, padded, torch.zeros_like(padded).masked_scatter(m, entropy))

    inputs = (case.logp[m].clone().requires_grad_(), case.entropy[m].clone().requires_grad_())
    assert torch.autograd.gradcheck(loss_of, inputs, eps=1e-7, atol=1e-7)


def test_cispo_weighs_the_score_by_a_constant() -> None:
    """Its gradient is not that of its value, so finite differences do not apply: it is -min(r, 1 + high) A
    weight.
    """
    case = make_case(2)
    config = LossConfig(variant="cispo", clip_high=0.28, tis_cap=1.3)
    logp = case.logp.clone().requires_grad_()
    (grad,) = torch.autograd.grad(our_loss(config, case, logp), logp)
    ratio = (case.logp - case.old).exp().clamp(max=1.28)
    expected = (
        -ratio * case.advantages[:, None] * (case.old - case.behaviour).exp().clamp(max=1.3) / LENGTHS.sum()
    )
    torch.testing.assert_close(grad, torch.where(case.mask, expected, 0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shuffling_and_splitting_change_nothing(variant: str) -> None:
    options = {"clip_low": 0.1, "kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.05, "tis_cap": 1.3}
    config = LossConfig(variant=variant, **options)
    case = make_case(3)
    m = case.mask
    logp = case.logp[m].clone().requires_grad_()
    noise = torch.randn(len(logp), generator=torch.Generator().manual_seed(1))
    advantage = case.advantages[SEGMENTS] + noise
    vectors = {"ref_logp": case.ref[m], "entropy": case.entropy[m], "sampler_logp": case.behaviour[m]}

    def of(index: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        keywords = {name: vector[index] for name, vector in vectors.items()}
        loss, stats = policy_loss(
            config, logp[index], case.old[m][index], advantage[index], ids, n, TOTAL, **keywords
        )
        sums = torch.stack([getattr(stats, field.name).double() for field in dataclasses.fields(stats)])
        return loss, torch.autograd.grad(loss, logp, retain_graph=True)[0], sums

    whole = of(torch.arange(len(logp)), SEGMENTS, S)
    assert whole[2][:2].sum() > 0, "nothing is clipped, so the case is too easy"
    order = torch.randperm(len(logp), generator=torch.Generator().manual_seed(2))
    shuffled = of(order, SEGMENTS[order], S)
    parts = []
    for rows in (torch.tensor([3]), torch.tensor([0, 4]), torch.tensor([1, 2])):
        index = torch.isin(SEGMENTS, rows).nonzero()[:, 0]
        parts.append(of(index, torch.searchsorted(rows, SEGMENTS[index]), len(rows)))  # ids local to the part
    split = [sum(values) for values in zip(*parts, strict=True)]
    for other in (shuffled, split):
        for ours, expected in zip(other, whole, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", ["dapo", "bnpo", "cispo"])
def test_on_policy_gradient_is_the_policy_gradient(variant: str) -> None:
    """At ratio 1 every token-mean variant reduces to REINFORCE: d loss / d logp = -A / tokens."""
    case = make_case(5)
    old = case.logp[case.mask]
    logp, advantage = old.clone().requires_grad_(), case.advantages[SEGMENTS]
    loss, stats = policy_loss(LossConfig(variant=variant), logp, old, advantage, SEGMENTS, S, TOTAL)
    (grad,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(grad, -advantage / LENGTHS.sum(), rtol=1e-14, atol=0)
    assert [int(x) for x in (stats.clipped_low, stats.clipped_high, stats.kl_old)] == [0, 0, 0]


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_kl_term_has_the_gradient_of_the_exact_kl(estimator: str) -> None:
    """The expectation over a vocabulary of what the loss adds (its advantage is 0 here), against autograd."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    config = LossConfig(kl_coef=1.0, kl_estimator=estimator)
    total, zero = Normaliser(tokens=1.0, rows=1.0), torch.zeros(1, dtype=torch.float64)
    estimate = torch.zeros_like(exact)
    for token in range(9):
        x = logp[token : token + 1]
        ids = torch.zeros(1, dtype=torch.long)
        loss, _ = policy_loss(config, x, x.detach(), zero, ids, 1, total, ref_logp=ref[token : token + 1])
        estimate += logp.detach()[token].exp() * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    torch.testing.assert_close(estimate, exact)


def test_kl_estimates_are_unbiased_where_they_should_be() -> None:
    g = torch.Generator().manual_seed(0)
    policy, ref = (torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - ref)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((policy.exp() * kl_estimate(policy, ref, estimator)).sum(), exact)
    assert (kl_estimate(policy, ref, "k2") == (policy - ref) ** 2 / 2).all()


def test_stats_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5], dtype=torch.float64)
    advantage = torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    ids = torch.zeros(5, dtype=torch.long)
    total = Normaliser(tokens=5.0, rows=1.0)
    _, stats = policy_loss(LossConfig(), ratio.log(), torch.zeros_like(ratio), advantage, ids, 1, total)
    assert (int(stats.clipped_low), int(stats.clipped_high)) == (1, 1)
    assert float(stats.kl_old) == pytest.approx(float((ratio - 1 - ratio.log()).sum()))


def test_works_under_torch_func_and_leaves_inputs_alone() -> None:
    case = make_case(6)
    config = LossConfig(variant="gspo", kl_coef=0.1)
    before = {name: value.clone() for name, value in vars(case).items()}
    logp = case.logp.clone().requires_grad_()
    (expected,) = torch.autograd.grad(our_loss(config, case, logp), logp)
    torch.testing.assert_close(torch.func.grad(lambda x: our_loss(config, case, x))(case.logp), expected)
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_and_an_empty_micro_batch(variant: str) -> None:
    case, single = make_case(7), make_case(7, dtype=torch.float32)
    config = LossConfig(variant=variant)
    loss = our_loss(config, single, single.logp)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), our_loss(config, case, case.logp), rtol=1e-5, atol=1e-6)
    empty, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    nothing, _ = policy_loss(config, empty, empty, empty, ids, 0, TOTAL)
    assert nothing.item() == 0


def test_imitation_loss_is_cross_entropy_over_the_tokens_of_the_step() -> None:
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 8, 1, 1, 5])
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    parts = imitation_loss(logp[:4], 6.0) + imitation_loss(logp[4:], 6.0)
    torch.testing.assert_close(parts, torch.nn.functional.cross_entropy(logits, targets))


def test_bad_settings_name_key_value_and_range() -> None:
    for key, value, name in (("variant", "ppo", "loss"), ("kl_estimator", "k4", ""), ("dual_clip", 1.0, "")):
        with pytest.raises(ValueError, match=f"grpo.{name or key} = {value!r}: accepted is"):
            LossConfig(**{key: value})
