"""Is it right on a GPU? The stages of bench/gpu_first.py that compare bits and gradients.

python -m bench.gpu_stages versions|smoke|update|recipe --device cuda --out FOLDER [--dry]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row
from duologue.grpo.update import accumulate_policy_gradient
from duologue.kernels import backend, libraries, ops, reference
from duologue.model.decoder import Decoder, score
from duologue.rollout.engine import kv_memory
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.sequence import Completion, SamplingParams
from torch import Tensor

from bench.gpu_driver import Place, stage_main
from bench.models import random_qwen3

SMALL = {"hidden": 1024, "inner": 3072, "layers": 2, "heads": 16, "vocab": 151_936}  # a slice of the 0.6B
TINY = {"hidden": 32, "inner": 48, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "vocab": 61}
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "flash-attn",
    "liger-kernel",
    "trl",
    "pytest-xdist",
    "tenacity",
)


def model_of(place: Place, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    if place.dry:
        Decoder.paged_layers = lambda self: None  # type: ignore[method-assign]  # the GPU's loop, on the CPU
        return random_qwen3(place.device, torch.float32, **TINY)
    return random_qwen3(place.device, dtype, **SMALL)


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    a, b = a.double().flatten(), b.double().flatten()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


# ---- versions ----------------------------------------------------------------------------------------------


def versions(place: Place) -> None:
    rows, cuda = place.rows, place.device != "cpu"
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    device = torch.cuda.get_device_name() if cuda else "cpu"
    rows.add("versions", python=sys.version.split()[0], device=device, **found)
    rows.add(
        "versions",
        cpu=backend.describe(),
        cuda=backend.describe("cuda"),
        attention=libraries.describe_attention(),
    )
    rows.check("versions", "addmm of bf16 into fp32", lambda: addmm(place))
    rows.check("versions", "fast attention with fewer key heads", lambda: fewer_key_heads(place))


def addmm(place: Place) -> dict[str, Any]:
    """The form of the head's weight gradient."""
    a, b = (torch.randn(64, 64, device=place.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.ones(64, 64, device=place.device)
    if place.dry:
        out.addmm_(a.float(), b.float())
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    error = relative(out, 1 + a.double() @ b.double())
    return {"ok": error < 1e-5, "error_of_sum": error}


def fewer_key_heads(place: Place) -> dict[str, Any]:
    """One call, forward and backward, against float64."""
    dtype = torch.float32 if place.dry else torch.bfloat16
    generator = torch.Generator(place.device).manual_seed(0)
    lengths = torch.tensor(
        [0, 5, 40] if place.dry else [0, 300, 1000], dtype=torch.int32, device=place.device
    )
    shapes = [(int(lengths[-1]), heads, 64) for heads in (8, 2, 2)]
    inputs = [torch.randn(*s, generator=generator, device=place.device).to(dtype) for s in shapes]

    def run(attend: Callable[..., Tensor], kind: torch.dtype, **more: Any) -> list[Tensor]:
        x = [tensor.to(kind).requires_grad_() for tensor in inputs]
        out = attend(*x, lengths, 0.125, **more)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    exact = run(reference.packed_attention, torch.float64)
    fast = run(ops.packed_attention, dtype, exact=False, max_seqlen=int(lengths.diff().max()))
    errors = [relative(a, b) for a, b in zip(fast, exact, strict=True)]
    return {"ok": max(errors) < 0.03, "errors": errors}


# ---- rollouts ----------------------------------------------------------------------------------------------


def prompts_of(place: Place, model: Decoder) -> list[list[int]]:
    """Groups that begin alike with more keys than are worth a pass of their own, and some others."""
    shared, groups, alone = (20, 2, 2) if place.dry else (700, 4, 5)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        drawn: list[int] = torch.randint(0, model.config.vocab_size, (n,), generator=generator).tolist()
        return drawn

    prompts = []
    for _ in range(groups):
        start = ids(shared)
        prompts += [start + ids(1 + i) for i in range(4)]
    return prompts + [ids(1 + 40 * i) for i in range(alone)]


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return [(c.token_ids, c.logprobs) for c in completions]


def smoke(place: Place) -> None:
    """Graphs against plain steps and the training forward; memory given back and elsewhere; two loops."""
    model, rows = model_of(place), place.rows
    prompts, new = prompts_of(place, model), 6 if place.dry else 40
    params = [
        SamplingParams(max_new_tokens=new - i % 5, temperature=0.9, seed=i) for i in range(len(prompts))
    ]
    sizes: dict[str, Any] = {"page_size": 16 if place.dry else 64, "cache_tokens": 8_192, "max_batch": 64}

    def play(engine: Engine) -> list[tuple[Any, ...]]:
        return drawn(engine.generate(prompts, params))

    plain = Engine(model, decode_steps=1, **sizes).generate(prompts, params)
    engine = Engine(model, decode_steps=8, **sizes)

    def graphs_are_plain() -> dict[str, Any]:
        return {"ok": play(engine) == drawn(plain), "engine": engine.stats.steps}

    def score_is_rollout() -> dict[str, Any]:
        worst, trained = 0.0, [(p, c) for p, c in zip(prompts, plain, strict=True)]
        with torch.no_grad():
            for prompt, completion in trained:
                (logprobs,) = score(model, [prompt + completion.token_ids], 0.9)
                ours = torch.tensor(completion.logprobs)
                worst = max(worst, float((ours - logprobs.cpu()[len(prompt) - 1 :]).abs().max()))
        return {"ok": worst == 0.0, "worst": worst}

    def memory_moves() -> dict[str, Any]:
        loop = engine._runner.loop
        address, captured = engine._runner.kv.data_ptr(), len(getattr(loop, "_buckets", ()))
        engine.release_memory()
        held = torch.empty(2**10 if place.dry else 20 * 2**30, dtype=torch.uint8, device=place.device)
        began = time.perf_counter()
        same = play(engine) == drawn(plain)
        seconds, moved = time.perf_counter() - began, engine._runner.kv.data_ptr() != address
        kept = len(getattr(loop, "_buckets", ()))
        pool = "" if place.dry else kv_memory.describe(torch.device(place.device))
        result = {"ok": same, "moved": moved, "graphs": [captured, kept], "s": seconds, "held": held.nbytes}
        return {**result, "pool": pool}

    rows.check("smoke", "graphs give what plain steps give", graphs_are_plain)
    rows.check("smoke", "the training forward has the rollout's bits", score_is_rollout)
    rows.check("smoke", "memory given back, and taken again", memory_moves)
    rows.check("smoke", "exact = false: one of two loops forgets", lambda: two_loops(model, play, sizes))


def two_loops(model: Decoder, play: Callable[[Engine], Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """The other replays, and the one captures again: into no dead pool, with no freed workspace."""
    model.use_exact(False)
    first, second = (Engine(model, decode_steps=8, **sizes) for _ in range(2))
    before = play(first), play(second)
    assert first._runner.loop is not None
    first._runner.loop.forget()
    after = play(second), play(first)
    model.use_exact(True)
    return {"ok": before[1] == after[0] and before[0] == after[1]}


# ---- updates -----------------------------------------------------------------------------------------------


def rollout_rows(place: Place, model: Decoder) -> list[Row]:
    """Sampled here, so that their log-probs are this policy's; they begin alike."""
    prompts = prompts_of(place, model)[:8]
    params = [SamplingParams(max_new_tokens=4 if place.dry else 64, seed=i) for i in range(len(prompts))]
    engine = Engine(model, cache_tokens=8_192, decode_steps=8)
    rows = []
    for i, (prompt, c) in enumerate(zip(prompts, engine.generate(prompts, params), strict=True)):
        row = Row(
            token_ids=prompt + c.token_ids,
            loss_mask=[False] * len(prompt) + [True] * len(c.token_ids),
            logprobs=[0.0] * len(prompt) + c.logprobs,
            advantage=(-1.0) ** i * (1 + i / 10),
            dialogue_id=i,
            role=0,
        )
        rows.append(row)
    return rows


def gradients(model: Decoder, rows: list[Row], variant: str = "dapo") -> tuple[Any, dict[str, Tensor]]:
    """(statistics, gradients) of one update's worth."""
    stats = accumulate_policy_gradient(
        model, rows, LossConfig(variant=variant), temperature=1.0, max_tokens=16_384
    )
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return stats, found


def default_gradients(model: Decoder, rows: list[Row]) -> dict[str, Tensor]:
    """Summed in fp32 by those who multiply, norms made again, attention's backward by a library."""
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0, fuse=True)
    model.recompute, model.library_backward = "norms", True
    how: Any = {"after_part": optimizer.accumulate, "backward": optimizer.backward}
    accumulate_policy_gradient(model, rows, LossConfig(), temperature=1.0, max_tokens=16_384, **how)
    model.recompute, model.library_backward = "none", False
    found = {name: m.grad.clone() for name, m in optimizer.masters.items() if m.grad is not None}
    optimizer.drop_gradients()
    optimizer.close()
    return found


def update(place: Place) -> None:
    model, out = model_of(place), place.rows
    rows = rollout_rows(place, model)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    first: dict[str, Any] = {}

    def exact() -> dict[str, Any]:
        first["stats"], first["grads"] = gradients(model, rows)
        stats = first["stats"]
        return {"ok": stats.mismatch == 0.0, "mismatch": stats.mismatch, "loss": stats.loss}

    def twice(variant: str) -> dict[str, Any]:
        a, b = (gradients(model, rows, variant)[1] for _ in range(2))
        other = [name for name in a if not torch.equal(a[name], b[name])]
        return {"ok": not other, "tensors": len(a), "differ": other[:5]}

    def definition() -> dict[str, Any]:
        """Against the same update in float64, where PyTorch alone serves."""
        wide = random_qwen3(place.device, torch.float64, **(TINY if place.dry else SMALL))
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                parameter.copy_(state[name])
        stats, grads = gradients(wide, rows)
        errors = {name: relative(first["grads"][name], grads[name]) for name in grads}
        worst = max(errors, key=lambda name: errors[name])
        ok = errors[worst] < 0.1 and abs(stats.loss - first["stats"].loss) < 1e-2
        return {"ok": ok, "worst": worst, "relative": errors[worst], "loss": stats.loss}

    def fast() -> dict[str, Any]:
        model.use_exact(False)
        stats, grads = gradients(model, rows)
        model.use_exact(True)
        worst = max(relative(grads[name], first["grads"][name]) for name in grads)
        return {"ok": worst < 0.1, "relative": worst, "mismatch": stats.mismatch, "loss": stats.loss}

    def by_default() -> dict[str, Any]:
        """As a run on CUDA is when its configuration is silent."""
        a, b = (default_gradients(model, rows) for _ in range(2))
        worst = max(relative(a[name], first["grads"][name].float()) for name in a)
        differ = [name for name in a if not torch.equal(a[name], b[name])]
        backward = libraries.describe_attention_backward()
        return {"ok": worst < 0.1 and not differ, "relative": worst, "differ": differ[:5], "by": backward}

    out.check("update", "mismatch is 0 in exact mode", exact)
    out.check("update", "settings of CUDA, twice", by_default)
    out.check("update", "two updates have the same bits: dapo", lambda: twice("dapo"))
    out.check("update", "two updates have the same bits: gspo", lambda: twice("gspo"))
    out.check("update", "gradients are those of float64", definition)
    out.check("update", "exact = false", fast)
    out.check("update", "the optimizer goes on from what it saved", lambda: saved(place, model, rows))


def saved(place: Place, model: Decoder, rows: list[Row]) -> dict[str, Any]:
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.0, "max_grad_norm": 1.0}
    path = place.out / "optimizer.pt"

    def step(optimizer: Optimizer) -> list[Tensor]:
        accumulate_policy_gradient(
            model, rows, LossConfig(), temperature=1.0, max_tokens=16_384, after_part=optimizer.accumulate
        )
        optimizer.step(1e-3)
        return [p.detach().clone() for p in model.parameters()]

    optimizer = Optimizer(model, **settings)
    step(optimizer)
    torch.save(optimizer.state_dict(), path)
    weights = [p.detach().clone() for p in model.parameters()]
    expected = step(optimizer)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    optimizer.close()
    again = Optimizer(model, **settings)
    again.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    path.unlink()
    return {"ok": all(map(torch.equal, step(again), expected))}


# ---- a run -------------------------------------------------------------------------------------------------

RECIPE = (
    "imitation.steps=6 imitation.dialogues=200 train.steps=4 train.save_every=2 grpo.group_size=4 "
    "grpo.groups_per_step=4 eval.dialogues=8 eval.partners=[] opponent.kind=self imitation.characters=[]"
)
RECIPE_DRY = (
    "model.hidden_size=32 model.intermediate_size=48 model.num_layers=1 "
    "model.num_heads=2 model.num_kv_heads=1 "
    "imitation.steps=2 train.steps=8 train.save_every=1 grpo.group_size=2 grpo.groups_per_step=2 "
    "eval.dialogues=2 dialogue.max_rounds=1 dialogue.max_tokens_per_turn=4"
)
TIMES = ("seconds", "peak_memory_bytes", "rollout_tokens_per_s", "update_tokens_per_s")


def recipe(place: Place) -> None:
    """A small run of `deal` from nothing: whole; and killed in self-play, then resumed. Metrics compared."""
    place.rows.check("recipe", "killed and resumed as if it had not been", lambda: kill_and_resume(place))


def kill_and_resume(place: Place) -> dict[str, Any]:
    settings = [*RECIPE.split(), *(RECIPE_DRY.split() if place.dry else [])]
    words = [word for s in settings for word in (f"--{s.partition('=')[0]}", s.partition("=")[2])]
    base = [sys.executable, "-m", "duologue.grpo.cli", "train", "deal", "--device", place.device]
    folder = Path(tempfile.mkdtemp())  # of what is in `out` only so many files come back
    runs = {name: folder / name for name in ("whole", "killed")}
    began = time.perf_counter()
    run_to_end([*base, "--run-dir", str(runs["whole"]), *words])
    seconds = time.perf_counter() - began
    at = (4 if place.dry else 9) - 1  # lines of metrics: in self-play
    process = subprocess.Popen(
        [*base, "--run-dir", str(runs["killed"]), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(metrics(runs["killed"])) < at:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    lines = len(metrics(runs["killed"]))
    run_to_end([*base, "--run-dir", str(runs["killed"]), "--resume", *words])
    whole, resumed = (metrics(path) for path in runs.values())
    differ = [a["step"] for a, b in zip(whole, resumed, strict=False) if a != b]
    shutil.rmtree(folder)
    ok = whole == resumed and len(whole) > 2
    mismatch = max((row.get("mismatch", 0.0) for row in whole), default=0.0)
    return {
        "ok": ok,
        "killed_at": lines,
        "lines": len(whole),
        "differ": differ,
        "mismatch": mismatch,
        "s": seconds,
    }


def run_to_end(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-500:]}")


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # being written
            break
        found.append({key: value for key, value in row.items() if key not in TIMES})
    return found


STAGES: dict[str, Callable[[Place], None]] = {
    "versions": versions,
    "smoke": smoke,
    "update": update,
    "recipe": recipe,
}

if __name__ == "__main__":
    sys.exit(stage_main(STAGES))
