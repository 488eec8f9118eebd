"""What the engine is asked that cannot be: a stop string that no text holds, a temperature beyond fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from duologue.grpo.cli import main
from duologue.model.config import ModelConfig
from duologue.model.decoder import Decoder
from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import LEAST_TEMPERATURE, SamplingParams


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Tokenizer) -> Decoder:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "head_dim": 16}
    config = ModelConfig(
        model_type="qwen3",
        vocab_size=tiny_tokenizer.vocab_size,
        num_heads=2,
        num_kv_heads=1,
        max_position_embeddings=128,
        **sizes,
    )
    made = Decoder(config)
    made.init_weights(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8)
    return made


@pytest.mark.parametrize("string", ["<|end|>", "I take it.<|end|>", "<|user|>"])
def test_a_stop_string_that_no_text_holds_is_refused(
    string: str, model: Decoder, tiny_tokenizer: Tokenizer
) -> None:
    engine = Engine(model, decode=tiny_tokenizer.decode, cache_tokens=512)
    with pytest.raises(ValueError, match=r"stop_strings has .* accepted is its id in stop_token_ids"):
        engine.generate([[5, 6]], SamplingParams(stop_strings=(string,)))
    found = engine.generate([[5, 6]], SamplingParams(stop_strings=("zzz", "<end>"), max_new_tokens=3))
    assert len(found[0].token_ids) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-7, -1.0, float("nan"), float("inf")])
def test_temperatures_that_fp32_cannot_take_are_refused(
    temperature: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=r"SamplingParams\.temperature = .*: accepted is 0 \(greedy\) or a fin"
    ):
        SamplingParams(temperature=temperature)
    assert main(["train", "deal", f"dialogue.temperature={temperature}", "--run-dir", "/nonexistent/x"]) == 2
    assert "dialogue.temperature = " in capsys.readouterr().err


def test_the_least_temperature_is_greedy_with_log_prob_0(model: Decoder) -> None:
    engine = Engine(model, cache_tokens=512)
    prompts = [[i, i + 1, i + 2] for i in range(5, 25, 5)]
    greedy = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=6))
    coldest = engine.generate(
        prompts, SamplingParams(temperature=LEAST_TEMPERATURE, max_new_tokens=6, seed=3)
    )
    for cold, expected in zip(coldest, greedy, strict=True):
        assert cold.token_ids == expected.token_ids
        assert max(map(abs, cold.logprobs)) < 1e-3
