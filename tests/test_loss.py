"""grpo/loss.py against TRL's own `_compute_loss`, finite differences, and the properties that splitting relies on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from duologue.grpo.loss import KL_ESTIMATORS, STATS, VARIANTS, LossConfig, Normaliser, policy_loss, reference_kl
from torch import Tensor

S, L, MAX_LENGTH = 5, 7, 11
LENGTHS = torch.tensor([7, 1, 4, 6, 3])


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


def our_loss(config: LossConfig, case: SimpleNamespace, logp: Tensor, entropy: Tensor | None = None) -> Tensor:
    """The same numbers as packed vectors."""
    m = case.mask
    loss, _ = policy_loss(
        config,
        logp[m],
        case.old[m],
        case.advantages[:, None].expand(S, L)[m],
        torch.arange(S)[:, None].expand(S, L)[m],
        LENGTHS,
        Normaliser.of(LENGTHS, MAX_LENGTH),
        ref_logp=case.ref[m],
        entropy=(case.entropy if entropy is None else entropy)[m],
        behaviour_logp=case.behaviour[m] if config.tis_cap else None,
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
            use_bias_correction_kl=False, delta=config.dual_clip or None, steps_per_generation=1, entropy_target=None
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
        settings["clip_low"] = 1.0  # TRL's cispo clips the upper side only
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
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(variant: str, estimator: str) -> None:
    dual = 0.0 if variant == "cispo" else 1.4
    config = LossConfig(
        variant=variant,
        clip_high=0.28,
        dual_clip=dual,
        kl_coef=0.3,
        kl_estimator=estimator,
        entropy_coef=0.1,
        tis_cap=1.3,
    )
    case = make_case(2)
    m = case.mask

    def loss_of(logp: Tensor, entropy: Tensor) -> Tensor:
        padded = torch.zeros(S, L, dtype=torch.float64).masked_scatter(m, logp)
        return our_loss(config, case, padded, torch.zeros_like(padded).masked_scatter(m, entropy))

    inputs = (case.logp[m].clone().requires_grad_(), case.entropy[m].clone().requires_grad_())
    if variant == "cispo":
        frozen = (case.logp - case.old).exp().clamp(0.8, 1.28) * case.advantages[:, None]
        tis = (case.old - case.behaviour).exp().clamp(max=1.3)
        kl = torch.func.grad(lambda x: 0.3 * reference_kl(estimator, x, case.old, case.ref)[m].sum())(case.logp)
        expected = (kl - frozen * tis)[m] / LENGTHS.sum()
        (grad,) = torch.autograd.grad(loss_of(*inputs), inputs[0])
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)
    else:
        assert torch.autograd.gradcheck(loss_of, inputs, eps=1e-7, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_shuffling_and_splitting_change_nothing(variant: str) -> None:
    config = LossConfig(variant=variant, clip_low=0.1, kl_coef=0.1, kl_estimator="k2", entropy_coef=0.05, tis_cap=1.3)
    case = make_case(3)
    m = case.mask
    logp = case.logp[m].clone().requires_grad_()
    segments = torch.arange(S)[:, None].expand(S, L)[m]
    advantage = case.advantages[:, None].expand(S, L)[m] + torch.randn(
        len(segments), generator=torch.Generator().manual_seed(1)
    )
    vectors = {"ref_logp": case.ref[m], "entropy": case.entropy[m], "behaviour_logp": case.behaviour[m]}
    normaliser = Normaliser.of(LENGTHS, MAX_LENGTH)

    def of(index: Tensor, ids: Tensor, lengths: Tensor):
        keywords = {name: vector[index] for name, vector in vectors.items()}
        return policy_loss(
            config, logp[index], case.old[m][index], advantage[index], ids, lengths, normaliser, **keywords
        )

    n = len(segments)
    whole, stats = of(torch.arange(n), segments, LENGTHS)
    (whole_grad,) = torch.autograd.grad(whole, logp)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    shuffled, shuffled_stats = of(order, segments[order], LENGTHS)
    (shuffled_grad,) = torch.autograd.grad(shuffled, logp)
    parts = []
    for rows in (torch.tensor([3]), torch.tensor([0, 4]), torch.tensor([1, 2])):
        index = torch.isin(segments, rows).nonzero()[:, 0]
        parts.append(of(index, torch.searchsorted(rows, segments[index]), LENGTHS[rows]))  # ids local to the part
    split, split_stats = sum(loss for loss, _ in parts), parts[0][1] + parts[1][1] + parts[2][1]
    (split_grad,) = torch.autograd.grad(split, logp)

    for loss, grad, means in (
        (shuffled, shuffled_grad, shuffled_stats.means()),
        (split, split_grad, split_stats.means()),
    ):
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(grad, whole_grad, rtol=1e-12, atol=1e-14)
        assert means == pytest.approx(stats.means(), rel=1e-12)


def test_token_level_variants_may_split_inside_a_sequence() -> None:
    case, m = make_case(4), make_case(4).mask
    segments = torch.arange(S)[:, None].expand(S, L)[m]
    advantage = case.advantages[segments]
    for variant in ("grpo", "dr_grpo", "dapo", "cispo"):
        config, normaliser = LossConfig(variant=variant), Normaliser.of(LENGTHS, MAX_LENGTH)
        parts = [
            policy_loss(config, case.logp[m][i], case.old[m][i], advantage[i], segments[i], LENGTHS, normaliser)[0]
            for i in torch.arange(len(segments)).split(4)
        ]
        whole, _ = policy_loss(config, case.logp[m], case.old[m], advantage, segments, LENGTHS, normaliser)
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 every token-mean variant reduces to REINFORCE: d loss / d logp = -A / tokens."""
    case, m = make_case(5), make_case(5).mask
    advantage = case.advantages[:, None].expand(S, L)[m]
    for variant in ("dapo", "bnpo", "cispo"):
        logp = case.logp[m].clone().requires_grad_()
        ids = torch.arange(S)[:, None].expand(S, L)[m]
        normaliser = Normaliser.of(LENGTHS, MAX_LENGTH)
        loss, stats = policy_loss(LossConfig(variant=variant), logp, case.logp[m], advantage, ids, LENGTHS, normaliser)
        (grad,) = torch.autograd.grad(loss, logp)
        torch.testing.assert_close(grad, -advantage / LENGTHS.sum(), rtol=1e-14, atol=0)
        means = stats.means()
        assert (means["ratio"], means["approx_kl"], means["clip_low"], means["clip_high"]) == (1, 0, 0, 0)


@pytest.mark.parametrize("estimator", ["k1", "k2"])
def test_kl_gradient_is_that_of_the_exact_kl(estimator: str) -> None:
    """Expectation over the vocabulary of the estimator's gradient, on-policy, against autograd through the full KL."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(9, generator=g, dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    estimate = (logp.detach().exp() * reference_kl(estimator, logp, logp.detach(), ref)).sum()
    torch.testing.assert_close(torch.autograd.grad(estimate, logits)[0], exact)


def test_stats_by_hand() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5], dtype=torch.float64)
    advantage = torch.tensor([-1.0, 1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    zeros, ids, lengths = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.long), torch.tensor([5])
    _, stats = policy_loss(
        LossConfig(),
        ratio.log(),
        zeros,
        advantage,
        ids,
        lengths,
        Normaliser.of(lengths, 8),
        behaviour_logp=zeros - 0.25,
    )
    means = stats.means()
    assert list(means) == list(STATS)
    assert means["clip_low"] == means["clip_high"] == pytest.approx(0.2)
    assert means["ratio"] == pytest.approx(1.0)
    assert means["mismatch"] == pytest.approx(0.25)
    assert means["approx_kl"] == pytest.approx(float((1 / ratio - 1 + ratio.log()).mean()))


def test_works_under_torch_func_and_leaves_inputs_alone() -> None:
    case = make_case(6)
    config = LossConfig(variant="gspo", kl_coef=0.1)
    before = {name: value.clone() for name, value in vars(case).items()}
    logp = case.logp.clone().requires_grad_()
    (expected,) = torch.autograd.grad(our_loss(config, case, logp), logp)
    torch.testing.assert_close(torch.func.grad(lambda x: our_loss(config, case, x))(case.logp), expected)
    for name, value in before.items():
        assert torch.equal(getattr(case, name), value), name


def test_float32_and_an_empty_micro_batch() -> None:
    case = make_case(7)
    single = make_case(7, dtype=torch.float32)
    for variant in VARIANTS:
        config = LossConfig(variant=variant)
        loss = our_loss(config, single, single.logp)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), our_loss(config, case, case.logp), rtol=1e-5, atol=1e-6)
        empty, ids = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        nothing, stats = policy_loss(config, empty, empty, empty, ids, LENGTHS, Normaliser.of(LENGTHS * 0, MAX_LENGTH))
        assert nothing.item() == 0
        assert set(stats.means().values()) == {0.0}


def test_bad_settings_name_key_value_and_range() -> None:
    bad = {"variant": "ppo", "kl_estimator": "k4", "clip_low": 1.5, "clip_high": 0.0, "kl_coef": -1.0, "tis_cap": 0.5}
    for key, value in {**bad, "dual_clip": 1.1}.items():
        with pytest.raises(ValueError, match=f"{key} = {value!r}: accepted is"):
            LossConfig(**{key: value})
    with pytest.raises(ValueError, match="dual_clip"):
        LossConfig(variant="cispo", dual_clip=3.0)
