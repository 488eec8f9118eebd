"""One GRPO step, rollout and update, against TRL's `GRPOTrainer` on the same weights, prompts and rewards.

    python -m bench.step [--only ours|trl] [--json] [--device cpu] [--steps 8] [--save]
    python -m bench.step --checkpoint FOLDER [--prompts 4]  # a real model in bf16

4.2M parameters (Qwen3: hidden 256, 4 layers, 4 heads, 2 KV heads, intermediate 768, vocab 4096, tied), fp32;
8 prompts of 64 tokens x 8 completions of exactly 64; one on-policy update (dapo, no KL). Checkpoint and
tokenizer are made on the spot, nothing is downloaded. A step is all of rollout, reward, forward, backward and
optimizer. Of a checkpoint the prompts are the first 64 tokens of our dilemmas; TRL trains its bf16 weights
themselves, ours has fp32 masters. The last line is JSON; --save adds it to bench/results/step.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from duologue.grpo.advantage import group_advantages
from duologue.grpo.config import from_dict
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row
from duologue.grpo.policy import use_device
from duologue.grpo.update import accumulate_policy_gradient
from duologue.model.checkpoint import load_model
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams

from bench.common import append_rows

DILEMMAS = Path(__file__).resolve().parent.parent / "rollout" / "data" / "dilemmas.jsonl"
GROUP, PROMPT_TOKENS, NEW_TOKENS, VOCAB = 8, 64, 64, 4096
RATE, BETAS, CLIP = 1e-5, (0.9, 0.999), 0.2
WARMUP = 2  # steps that are not counted


class Job(NamedTuple):
    folder: Path
    dtype: torch.dtype
    prompts: list[list[int]]
    texts: list[str]  # of the same tokens
    steps: int
    device: str

    @property
    def sampled(self) -> int:
        return len(self.prompts) * GROUP * NEW_TOKENS


def make_checkpoint(folder: Path, n: int) -> tuple[list[list[int]], list[str]]:
    """A random model and a tokenizer of one word per id, as transformers writes them; returns `n` prompts."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder)
    prompts = torch.randint(4, VOCAB, (n, PROMPT_TOKENS)).tolist()
    return prompts, [" ".join(f"w{token}" for token in prompt) for prompt in prompts]


def prompts_for(folder: Path, n: int) -> tuple[list[list[int]], list[str]]:
    """The beginnings of `n` dilemmas that are PROMPT_TOKENS tokens of a checkpoint's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: dict[str, list[int]] = {}
    for line in DILEMMAS.read_text("utf-8").splitlines():
        text = tokenizer.decode(tokenizer(json.loads(line)["text"])["input_ids"][:PROMPT_TOKENS])
        ids = tokenizer(text)["input_ids"]
        if len(ids) == PROMPT_TOKENS and len(found) < n:
            found[text] = ids
    if len(found) < n:
        raise SystemExit(f"--prompts {n}: accepted is at most {len(found)} with {folder}")
    return list(found.values()), list(found)


def reward(token_ids: list[int]) -> float:
    """The share of even ids: trivial to compute, and it varies within every group."""
    return sum(t % 2 == 0 for t in token_ids) / len(token_ids)


def run_ours(job: Job) -> dict[str, list[float]]:
    """Seconds of each step, and of its rollout and update."""
    threads, prompts = torch.get_num_threads(), job.prompts
    use_device(from_dict({"model": {"device": job.device}}))  # as `duologue train` does
    model, _ = load_model(job.folder, job.device, job.dtype)
    engine = Engine(model)
    optimizer = Optimizer(model, betas=BETAS, weight_decay=0.0, max_grad_norm=1.0)
    loss = LossConfig(variant="dapo", clip_low=CLIP, clip_high=CLIP)
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    group_ids = torch.arange(len(prompts)).repeat_interleave(GROUP)
    seconds: dict[str, list[float]] = {"step": [], "rollout": [], "update": []}
    for _ in range(WARMUP + job.steps):
        began = time.perf_counter()
        completions = rollout(engine, prompts, params)
        rolled = time.perf_counter()
        rewards = torch.tensor([reward(c.token_ids) for c in completions])
        found = group_advantages(
            rewards, group_ids, torch.ones_like(group_ids, dtype=torch.bool)
        ).value.tolist()
        rows = [
            Row(
                token_ids=prompts[i // GROUP] + c.token_ids,
                loss_mask=[False] * PROMPT_TOKENS + [True] * len(c.token_ids),
                logprobs=[0.0] * PROMPT_TOKENS + c.logprobs,
                advantage=found[i],
                dialogue_id=i,
                role=0,
            )
            for i, c in enumerate(completions)
        ]
        accumulate_policy_gradient(model, rows, loss, temperature=1.0, max_tokens=16_384)
        optimizer.step(RATE)
        ended = time.perf_counter()
        assert sum(row.n_trained for row in rows) == job.sampled
        for name, value in (("step", ended - began), ("rollout", rolled - began), ("update", ended - rolled)):
            seconds[name].append(value)
    torch.set_num_threads(threads)
    return {name: values[WARMUP:] for name, values in seconds.items()}


def rollout(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
    """GROUP completions per prompt, in order; a prompt is computed once and forked, as the arena does it."""
    bases = [engine.open(prompt) for prompt in prompts]
    engine.prefill(bases)
    branches = [branch for base in bases for branch in base.fork(GROUP)]
    requests = [engine.start(branch, params) for branch in branches]
    engine.run()
    for branch in (*bases, *branches):
        branch.close()
    return [request.completion for request in requests]


def run_trl(job: Job) -> dict[str, list[float]]:
    """Seconds of each step of GRPOTrainer: its defaults, but for what makes the step the same, and no
    checkpointing."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def trivial_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        assert all(len(ids) == NEW_TOKENS for ids in completion_ids)
        return [reward(ids) for ids in completion_ids]

    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.folder, dtype=job.dtype),
        reward_funcs=trivial_reward,
        train_dataset=datasets.Dataset.from_dict({"prompt": job.texts}),
        processing_class=AutoTokenizer.from_pretrained(job.folder, padding_side="left"),
        callbacks=[Clock()],
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-"),
            use_cpu=job.device == "cpu",
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10_000,
            max_steps=WARMUP + 1 + job.steps,
            seed=0,
            per_device_train_batch_size=len(job.prompts) * GROUP,
            num_generations=GROUP,
            gradient_accumulation_steps=1,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            beta=0.0,
            loss_type="dapo",
            epsilon=CLIP,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            max_grad_norm=1.0,
            gradient_checkpointing=False,
        ),
    )
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    return {"step": [b - a for a, b in pairwise(ends)][WARMUP:]}


PROVIDERS = {"trl": run_trl, "ours": run_ours}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=sorted(PROVIDERS))
    parser.add_argument("--json", action="store_true", help="no table")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path, help="a folder as transformers writes it, trained in bf16")
    parser.add_argument("--prompts", type=int, default=8, help=f"of a step; each has {GROUP} completions")
    parser.add_argument("--save", action="store_true", help="add a row to bench/results/step.csv")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.checkpoint or Path(name)
        prompts, texts = (prompts_for if args.checkpoint else make_checkpoint)(folder, args.prompts)
        dtype = torch.bfloat16 if args.checkpoint else torch.float32
        job = Job(folder, dtype, prompts, texts, args.steps, args.device)
        chosen = [p for p in PROVIDERS if args.only in (None, p)]
        times = {p: PROVIDERS[p](job) for p in chosen}
    medians = {
        p: {part: statistics.median(values) for part, values in parts.items()} for p, parts in times.items()
    }
    speeds = {p: job.sampled / parts["step"] for p, parts in medians.items()}
    if not args.json:
        columns = ("s / step", "fastest", "slowest", "rollout", "update", "tokens/s")
        print(" " * 6 + "".join(f"{name:>10}" for name in columns))
        for p, parts in medians.items():
            times_of_step = (parts["step"], min(times[p]["step"]), max(times[p]["step"]))
            text = "".join(f"{x:10.3f}" for x in times_of_step)
            text += "".join(
                f"{parts[part]:10.3f}" if part in parts else " " * 10 for part in ("rollout", "update")
            )
            print(f"{p:6}{text}{speeds[p]:10.0f}")
    result: dict[str, Any] = {
        "bench": "step",
        "device": args.device,
        "model": args.checkpoint.name if args.checkpoint else "4.2M",
        "prompts": len(prompts),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    result |= {"tokens_per_s": speeds["ours"]} if "ours" in speeds else {}
    result |= {"trl_tokens_per_s": speeds["trl"]} if "trl" in speeds else {}
    result |= {"ratio": speeds["ours"] / speeds["trl"]} if len(speeds) == 2 else {}
    result |= {f"{p}_{part}_s": value for p, parts in medians.items() for part, value in parts.items()}
    if args.save:
        row = {key: value for key, value in result.items() if key not in ("bench", "device", "threads")}
        append_rows("step", [{"device_type": args.device, **row}])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
