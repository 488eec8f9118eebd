"""grpo/optimizer.py against torch.optim.AdamW and clip_grad_norm_, a resumed run against a whole one."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from duologue.grpo.optimizer import Optimizer, learning_rate
from duologue.model.checkpoint import save_model
from duologue.model.tokenizer import Tokenizer
from duologue.model.weights import SINGLE
from tiny import decoder
from torch import nn

SETTINGS = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": 1.0}


def make_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 3)).to(dtype)


def loss(model: nn.Module, step: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    x = torch.randn(5, 7, generator=g).to(next(model.parameters()).dtype)
    return model(x).float().square().sum() * scale


def backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    loss(model, step, scale).backward()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_twenty_steps_equal_torch(max_grad_norm: float) -> None:
    ours, theirs = make_model(), make_model()
    optimizer = Optimizer(ours, **{**SETTINGS, "max_grad_norm": max_grad_norm})
    matrices, vectors = ([p for p in theirs.parameters() if (p.ndim >= 2) == flag] for flag in (True, False))
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(20):
        rate = learning_rate(step, peak=1e-2, warmup_steps=5, total_steps=20, schedule="cosine")
        backward(ours, step)
        backward(theirs, step)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm or float("inf"))
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert optimizer.step(rate) == pytest.approx(float(expected), rel=1e-6)
    # Against an unclipped or undecayed run the difference would be 1e-2 and more.
    torch.testing.assert_close(values(ours), values(theirs), rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in ours.parameters())


def test_low_precision_weights_follow_their_fp32_masters_in_place() -> None:
    """The bf16 weights are at every step the rounding of an fp32 AdamW that is fed the same gradients."""
    model, shadow = make_model(torch.bfloat16), make_model(torch.bfloat16).float()
    optimizer, reference = (Optimizer(m, **{**SETTINGS, "max_grad_norm": 0.0}) for m in (model, shadow))
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    for step in range(20):
        grads = torch.autograd.grad(loss(model, step), list(model.parameters()))
        torch.autograd.backward(list(model.parameters()), grads)
        torch.autograd.backward(list(shadow.parameters()), [grad.float() for grad in grads])
        assert optimizer.step(1e-3) == reference.step(1e-3)
        assert all(
            torch.equal(p, m.bfloat16()) for p, m in zip(model.parameters(), shadow.parameters(), strict=True)
        )
    assert storage == [parameter.data_ptr() for parameter in model.parameters()]
    start = values(make_model(torch.bfloat16))
    # A layer norm's 1.0 moves by 1e-3 a step, less than bf16 resolves there: it moves through the master
    # only.
    assert not any(torch.equal(a, b) for a, b in zip(values(model), start, strict=True))


def test_low_precision_gradients_are_summed_in_fp32() -> None:
    model = make_model(torch.bfloat16)
    optimizer = Optimizer(model, **SETTINGS)
    sums = [torch.zeros(parameter.shape) for parameter in model.parameters()]
    for step in range(6):
        grads = torch.autograd.grad(loss(model, step, scale=0.1), list(model.parameters()))
        for total, grad in zip(sums, grads, strict=True):
            total += grad.float()
        backward(model, step, scale=0.1)
        optimizer.accumulate()
        assert all(parameter.grad is None for parameter in model.parameters())
    expected = sum(float(total.double().square().sum()) for total in sums)
    assert float(optimizer.squared_grad_norm()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_is_bit_identical(dtype: torch.dtype) -> None:
    def run(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step(1e-3)

    whole, first, second = make_model(dtype), make_model(dtype), make_model(dtype)
    run(whole, Optimizer(whole, **SETTINGS), range(8))
    optimizer = Optimizer(first, **SETTINGS)
    run(first, optimizer, range(5))
    file = io.BytesIO()
    torch.save((first.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    second.load_state_dict(weights)
    resumed = Optimizer(second, **SETTINGS)
    resumed.load_state_dict(state)
    run(second, resumed, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(values(whole), values(second), strict=True))


def test_a_norm_reduced_over_ranks_is_the_one_that_clips() -> None:
    a, b = make_model(), make_model()
    alone, one_of_two = (Optimizer(model, **SETTINGS) for model in (a, b))
    backward(a, 0)
    backward(b, 0)
    norm = alone.step(1e-2)
    assert one_of_two.step(1e-2, squared_norm=2 * one_of_two.squared_grad_norm()) == pytest.approx(
        norm * 2**0.5
    )
    scaled = [state["exp_avg"] for state in one_of_two._adamw.state.values()]
    torch.testing.assert_close(
        [s * 2**0.5 for s in scaled], [s["exp_avg"] for s in alone._adamw.state.values()]
    )


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model = make_model()
    optimizer = Optimizer(model, **SETTINGS)
    backward(model, 0)
    optimizer.step(1e-2)
    weights, state = values(model), {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    backward(model, 1, scale=float("nan"))
    with pytest.raises(RuntimeError, match="gradient norm is nan"):
        optimizer.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(weights, values(model), strict=True))
    assert all(torch.equal(tensor, state[key]) for key, tensor in optimizer.state_dict().items())


def held(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address and bytes of the memory that they lie in."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_and_gradients_lie_in_buffers_that_stay(
    dtype: torch.dtype, tied: bool, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One for the matrices of each layer and one for its vectors; what is saved does not show it."""
    plain = decoder(num_layers=2, tie_word_embeddings=tied).to(dtype)
    model = copy.deepcopy(plain)
    optimizer = Optimizer(model, **SETTINGS)
    for name, each in (("plain", plain), ("ours", model)):
        save_model(each, tiny_tokenizer, tmp_path / name)
    assert (tmp_path / "ours" / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()
    buffers = 2 * 2 + 2 + (not tied)  # and embedding, last norm, head
    numbers = sum(p.numel() for p in model.parameters())
    padding = 63 * len([*model.parameters()])
    addresses = [p.data_ptr() for p in model.parameters()]
    for step in range(3):
        model(torch.arange(8)[None] + step).square().sum().backward()
        gradients = held(optimizer.gradients())
        assert len(held(model.parameters())) == len(gradients) == buffers
        assert 0 <= sum(held(model.parameters()).values()) // dtype.itemsize - numbers <= padding
        assert 0 <= sum(gradients.values()) // 4 - numbers <= padding
        if dtype == torch.float32:
            assert held(p.grad for p in model.parameters()) == gradients
        optimizer.step(1e-2)
        if step == 1:
            state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
            optimizer.reset()
            optimizer.load_state_dict(state)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(address % 64 == 0 for address in addresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_begins_anew_is_as_a_new_one(dtype: torch.dtype) -> None:
    model = make_model(dtype)
    optimizer = Optimizer(model, **SETTINGS)
    for step in range(3):
        backward(model, step)
        optimizer.step(1e-2)
    backward(model, 3)  # of which nothing is left
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    other = copy.deepcopy(model)
    optimizer.reset()
    fresh = Optimizer(other, **SETTINGS)
    for step in range(3, 6):
        for each, of_each in ((model, optimizer), (other, fresh)):
            backward(each, step)
            of_each.step(1e-2)
    assert all(torch.equal(a, b) for a, b in zip(values(model), values(other), strict=True))
    ours, new = optimizer.state_dict(), fresh.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in new.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_seen_by_who_watches_the_version_of_the_weights(dtype: torch.dtype) -> None:
    """The engine drops its KV when a parameter's version has changed."""
    model = make_model(dtype)
    optimizer = Optimizer(model, **SETTINGS)
    backward(model, 0)
    before = [parameter._version for parameter in model.parameters()]
    optimizer.step(1e-3)
    assert all(parameter._version > old for parameter, old in zip(model.parameters(), before, strict=True))


def test_a_frozen_parameter_stays_out() -> None:
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = Optimizer(model, **SETTINGS)
    before = model[0].weight.clone()
    backward(model, 0)
    optimizer.step(1e-2)
    assert torch.equal(model[0].weight, before)
    assert "exp_avg.0.weight" not in optimizer.state_dict()


def test_wrong_state_is_named() -> None:
    optimizer = Optimizer(make_model(), **SETTINGS)
    state = optimizer.state_dict()
    cases = {
        r"exp_avg\.0\.bias is missing": {key: t for key, t in state.items() if key != "exp_avg.0.bias"},
        r"exp_avg\.9\.bias belongs to no parameter": {**state, "exp_avg.9.bias": torch.zeros(1)},
        r"exp_avg\.0\.weight has shape \[1\], expected \[13, 7\]": {
            **state,
            "exp_avg.0.weight": torch.zeros(1),
        },
    }
    for message, wrong in cases.items():
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)


def test_without_a_gradient_nothing_moves() -> None:
    model = make_model()
    before = values(model)
    assert Optimizer(model, **SETTINGS).step(1e-2) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        return [
            learning_rate(s, peak=8.0, warmup_steps=4, total_steps=13, schedule=schedule) for s in range(15)
        ]

    assert rates("constant") == [2, 4, 6, 8] + [8] * 11
    assert rates("cosine")[:5] == [2, 4, 6, 8, 8]
    assert rates("cosine")[8] == pytest.approx((8 + 0.8) / 2)  # half way down to a tenth
    assert rates("cosine")[12:] == pytest.approx([0.8] * 3)
    assert learning_rate(0, peak=3.0, warmup_steps=0, total_steps=1, schedule="cosine") == 3
    with pytest.raises(ValueError, match="schedule = 'linear': accepted is one of constant, cosine"):
        learning_rate(0, peak=1.0, warmup_steps=0, total_steps=1, schedule="linear")
