"""The example of README that uses a kernel in TRL's trainer, as it stands there: a real training step has TRL's own gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.kernels import backend

trl = pytest.importorskip("trl", reason="trl is a development dependency")
ROOT = Path(__file__).parent.parent


def example() -> Any:
    """The trainer that README defines."""
    section = (ROOT / "README.md").read_text("utf-8").split("### Use the kernels in your trainer")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names["FusedHeadGRPOTrainer"]


def gradients_of_a_step(trainer_class: Any, folder: Path, beta: float) -> dict[str, torch.Tensor]:
    """All gradients of one step of `trainer_class` on a tiny Qwen3; two prompts of unequal length, four completions each."""
    import datasets
    import tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=61,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)  # TRL reads the reference policy from there
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    grads: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            grads.update((name, p.grad.clone()) for name, p in model.named_parameters())

    trainer = trainer_class(
        model=Qwen3ForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completion_ids, **_: [
            sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids
        ],
        train_dataset=datasets.Dataset.from_dict({"prompt": ["w5 w6 w7 w8 w9", "w10 w11"]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="w0", eos_token="w1", pad_token="w2", padding_side="left"
        ),
        callbacks=[Keep()],
        args=trl.GRPOConfig(
            output_dir=str(folder / "run"),
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            max_steps=1,
            seed=0,
            per_device_train_batch_size=8,
            num_generations=4,
            gradient_accumulation_steps=1,
            max_completion_length=24,
            temperature=0.9,
            top_k=0,
            top_p=1.0,
            beta=beta,
            learning_rate=1e-3,
            max_grad_norm=1e9,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    return grads


@pytest.mark.skipif(not backend.available(), reason="the C++ kernels are not built")
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_trainer_of_the_readme_has_trls_gradients(tmp_path: Path, beta: float) -> None:
    expected = gradients_of_a_step(trl.GRPOTrainer, tmp_path, beta)
    found = gradients_of_a_step(example(), tmp_path, beta)
    assert found.keys() == expected.keys()
    assert float(expected["model.embed_tokens.weight"].norm()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-8
        )
