"""The frozen base in four bits: bitsandbytes' own layers, gradients, bits of rollout and training, memory,
and a run.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.kernels import backend
from duologue.model.checkpoint import load_model, save_model
from duologue.model.decoder import Decoder, Linear, score
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.model.quantized import QuantizedLinear, quantize
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import SamplingParams
from tiny import TINY_DEAL, decoder

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional")
needs_cpp = pytest.mark.skipif(
    not backend.available(), reason="bitwise equality is a promise of the C++ kernels, which are not built"
)


def make_model(vocab: int = 275) -> Decoder:
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 400}
    return decoder(model_type="qwen2", vocab_size=vocab, qkv_bias=True, **shape)


def make_policy(dtype: torch.dtype = torch.float32) -> LoraDecoder:
    base = quantize(make_model().to(dtype))
    policy = LoraDecoder(
        base, new_adapter(base, LoraSettings(rank=3, alpha=6.0, targets=("q_proj", "down_proj")), 0)
    )
    with torch.no_grad():
        for parameter in policy.adapter.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_bitsandbytes_own(dtype: torch.dtype) -> None:
    plain = Linear(128, 96, bias=True)
    torch.nn.init.normal_(plain.weight)
    torch.nn.init.normal_(plain.bias)
    plain = plain.to(dtype)
    theirs = bitsandbytes.nn.Linear4bit(
        128, 96, bias=True, compute_dtype=dtype, compress_statistics=False, quant_type="nf4"
    )
    theirs.load_state_dict({"weight": plain.weight.data, "bias": plain.bias.data})
    theirs = theirs.to("cpu")
    ours, x = QuantizedLinear(plain), torch.randn(7, 128).to(dtype).requires_grad_()
    weight = bitsandbytes.functional.dequantize_4bit(ours.packed, ours.state)
    assert 0.05 < float((weight - plain.weight).norm() / plain.weight.norm()) < 0.15
    expected, found = torch.nn.functional.linear(x, weight, plain.bias), ours.forward(x)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(found, theirs(x), rtol=10 * tolerance, atol=20 * tolerance)
    grad = torch.randn_like(found)
    (ours_grad,), (plain_grad,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=tolerance, atol=10 * tolerance)


def test_adapters_have_the_gradients_of_the_unpacked_model() -> None:
    policy = make_policy()
    unpacked = make_model()
    for name, module in policy.adapter_off.model.named_modules():
        if isinstance(module, QuantizedLinear):
            unpacked.model.get_submodule(name).weight.data.copy_(module.weight)
    plain = LoraDecoder(unpacked, copy.deepcopy(policy.adapter))
    plain.adapter.load_state_dict(policy.adapter.state_dict())
    ids = [[3, 5, 9, 100, 7, 8], [1, 2, 3]]
    for model in (policy, plain):
        torch.cat(score(model, ids)).sum().backward()
    pairs = zip(policy.adapter.parameters(), plain.adapter.parameters(), strict=True)
    for found, expected in pairs:
        assert found.grad is not None
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_has_the_bits_of_training_with_the_adapter_on_and_off(dtype: torch.dtype) -> None:
    policy = make_policy(dtype)
    engine = Engine(policy, max_step_tokens=16)
    engine.use_adapters([None])
    branches = [engine.open([5 + i, 7, 9], adapter=i % 2) for i in range(4)]
    requests = [engine.start(b, SamplingParams(max_new_tokens=9, seed=i)) for i, b in enumerate(branches)]
    engine.run()
    for i, request in enumerate(requests):
        with torch.no_grad():
            (whole,) = score(policy if i % 2 == 0 else policy.adapter_off, [branches[i].token_ids])
        assert whole[2:].tolist() == request.completion.logprobs


def test_the_layers_take_an_eighth_of_fp32() -> None:
    before = sum(p.nbytes for p in make_model().model.layers.parameters())
    model = quantize(make_model())
    states = [m.state.absmax.nbytes for m in model.modules() if isinstance(m, QuantizedLinear)]
    after = sum(x.nbytes for x in (*model.model.layers.parameters(), *model.model.layers.buffers())) + sum(
        states
    )
    assert after < before / 5  # biases, norms and a scale of 64 weights beside
    assert not any(type(m) is Linear for m in model.model.layers.modules())


def test_a_run_trains_saves_and_resumes_on_packed_weights(
    tmp_path: Path, tiny_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    save_model(make_model(), tiny_tokenizer, base)
    tiny = [word for word in TINY_DEAL if not word.startswith(("model.", "imitation.", "train.steps"))]
    command = ["train", "deal", "--model", str(base), *tiny, "imitation.steps=0", "grpo.imitation_coef=0"]
    command += ["lora.rank=2", "lora.quantize=nf4", "game.telling=plain"]
    run = tmp_path / "run"
    assert main([*command, "train.steps=1", "--run-dir", str(run)]) == 0
    assert main([*command, "train.steps=2", "--run-dir", str(run), "--resume"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["mismatch"] for row in rows if row["stage"] == "selfplay"] == [0.0, 0.0]
    assert main(["export", str(run), str(tmp_path / "out"), "--merge"]) == 0
    assert type(load_model(tmp_path / "out")[0]) is Decoder
    assert main(["train", "deal", *TINY_DEAL, "lora.quantize=nf4", "--run-dir", str(tmp_path / "no")]) == 2
    assert "accepted is '' with lora.rank = 0" in capsys.readouterr().err


def test_what_is_packed_waits_on_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacked it may not fit the device, where it goes one linear at a time."""
    from duologue.grpo import policy
    from duologue.grpo.config import load_config

    (tmp_path / "config.json").write_text("{}")
    loaded: list[str] = []

    def load(path: Path, device: str, *_: Any) -> tuple[Any, Any]:
        loaded.append(device)
        return make_model(), None

    monkeypatch.setattr(policy, "load_model", load)
    monkeypatch.setattr(policy, "quantize", lambda model, to: loaded.append(f"packed on {to}") or model)
    settings = [f"model.path={tmp_path}", "model.dtype=float32", "lora.rank=2", "model.device=cuda:0"]
    for packed, expected in (("nf4", ["cpu", "packed on cuda:0"]), ("", ["cuda:0"])):
        policy.build_policy(load_config("deal", [*settings, f"lora.quantize={packed}"]), [])
        assert loaded == expected
        loaded.clear()
