"""What `duologue plan` predicts is what a model takes: saved tensors, optimizer state, the pool."""

from __future__ import annotations

import gc
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from duologue.grpo.build import build_optimizer
from duologue.grpo.cli import main
from duologue.grpo.commands.ranks import devices, loopback, reduction, space
from duologue.grpo.config import load_config
from duologue.grpo.distributed.sharded import ShardedOptimizer
from duologue.grpo.loss import LossConfig
from duologue.grpo.optimizer import Optimizer
from duologue.grpo.packing import Row, hidden_nodes, pack
from duologue.grpo.plan import activation_bytes, check_memory, make_plan, shape, shape_of
from duologue.grpo.update import accumulate_policy_gradient
from duologue.grpo.world import World
from duologue.model.decoder import Decoder
from duologue.model.lora import LoraDecoder, LoraSettings, new_adapter
from duologue.rollout.engine.runner import Runner
from tiny import MODEL, model_config
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2}


def saved_bytes(model: Decoder, rows: list[Row]) -> int:
    """Of all that a forward keeps for its backward, each storage once, without the parameters."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []

    def pack_hook(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):  # a way to make it again, whose tensors are kept elsewhere
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def within(inner: Callable[[Any], Any], unpack: Callable[[Any], Any]) -> saved_tensors_hooks:
        """Of hooks in hooks PyTorch calls the inner ones alone."""
        return saved_tensors_hooks(lambda tensor: pack_hook(inner(tensor)), unpack)

    batch = pack(rows)
    model.rotary_tables(batch.positions)
    inner_hooks = mock.patch("duologue.model.recompute.saved_tensors_hooks", within)
    with saved_tensors_hooks(pack_hook, lambda tensor: tensor), inner_hooks:
        hidden = hidden_nodes(model, batch)
    assert hidden.requires_grad
    tables = {t.untyped_storage().data_ptr() for t in model.rotary_tables(batch.positions)}
    return sum(size for address, size in kept.items() if address not in tables)


def row(start: int, length: int, same: int) -> Row:
    """`same` tokens that every row begins with, and then its own."""
    ids = [*range(1, same + 1), *[start + i % 7 for i in range(length - same)]]
    mask = [i >= same and i > 0 for i in range(length)]
    return Row(token_ids=ids, loss_mask=mask, logprobs=[0.0] * length, advantage=1.0, dialogue_id=0, role=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("same", [0, 20])
@pytest.mark.parametrize("recompute", ["none", "norms"])
def test_activations_are_what_autograd_saves(
    dtype: torch.dtype, rank: int, same: int, recompute: str
) -> None:
    config = model_config(**SIZES)
    model = Decoder(config)
    model.init_weights(0)
    model.to(dtype)
    if rank:
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank), 0))
    model.recompute = recompute
    rows = [row(21 + 2 * i, 64, same) for i in range(6)]
    batch = pack(rows)
    sizes = {"nodes": len(batch.first), "tokens": len(batch.nodes), "itemsize": dtype.itemsize}
    predicted = activation_bytes(config, **sizes, rank=rank, recompute=recompute)
    assert predicted == pytest.approx(saved_bytes(model, rows), rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_state_is_what_the_optimizer_and_the_engine_hold(dtype: str, rank: int) -> None:
    config = load_config("deal", [*MODEL, f"model.dtype={dtype}", *lora(rank)])
    sizes = model_config(**SIZES)
    model = Decoder(sizes)
    model.to(getattr(torch, dtype))
    if rank:
        model = LoraDecoder(model, new_adapter(model, LoraSettings(rank=rank), 0))
    plan = make_plan(config, sizes, device="cpu")
    optimizer = Optimizer(model, betas=(0.9, 0.95), weight_decay=0.0, max_grad_norm=1.0)
    state = optimizer.state_dict()
    moments = sum(t.nbytes for name, t in state.items() if name.startswith("exp_avg"))
    masters = sum(t.nbytes for name, t in state.items() if name.startswith("master"))
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    assert plan.moments == moments
    assert plan.masters == masters
    assert plan.gradients == sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    runner = Runner(model, [None], config.rollout.cache_tokens // 16, 16, 1)
    assert plan.pool == runner.kv.nbytes


class OneOf(World):
    """A rank of several that have the same, as far as memory goes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def each(self, value: Any) -> list[Any]:
        return [value] * self.size

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return [number * self.size for number in numbers]

    def scatter(self, flat: torch.Tensor) -> Callable[[], Sequence[torch.Tensor]]:
        parts = flat.clone()
        return lambda: parts.chunk(self.size)

    def join(self, flat: torch.Tensor) -> None:
        flat.copy_(flat.chunk(self.size)[0].repeat(self.size))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's allocator has given out at a time."""
    gc.collect()  # what an earlier test left must not be freed in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert kept
    assert events
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(
    ("dtype", "ranks", "recompute", "shares", "tied", "fuse"),
    [
        ("float32", 1, "none", 0, False, False),
        ("bfloat16", 1, "norms", 0, False, False),
        ("bfloat16", 4, "none", 0, False, False),
        ("float32", 4, "layer", 0, True, False),
        ("float32", 1, "none", 4, False, False),
        ("bfloat16", 1, "layer", 4, True, False),
        ("bfloat16", 1, "none", 0, False, True),
        ("bfloat16", 1, "layer", 0, True, True),
        ("bfloat16", 4, "norms", 0, True, True),
    ],
)
def test_the_peak_of_an_update_is_the_measured_one(
    dtype: str, ranks: int, recompute: str, shares: int, tied: bool, fuse: bool
) -> None:
    settings = [f"model.dtype={dtype}", f"train.recompute={recompute}", f"train.shares={shares}"]
    settings.append(f"train.gradient_accumulation_fusion={str(fuse).lower()}")
    more = ["train.tokens_per_microbatch=512", "train.kl_every=0", "rollout.release_memory=true"]
    config = load_config("deal", [*MODEL, "opponent.kind=self", *settings, *more])
    sizes = model_config(
        **SIZES, head_dim=32, vocab_size=2000, max_position_embeddings=512, tie_word_embeddings=tied
    )
    rows = [
        Row(
            token_ids=[(17 * i + (i + 3) * k) % 2000 for k in range(128)],
            loss_mask=[k > 0 for k in range(128)],
            logprobs=[-7.0] * 128,
            advantage=1.0,
            dialogue_id=i,
            role=0,
            share=i // 4 % 4,  # of several rounds
        )
        for i in range(32)
    ]
    world = OneOf(ranks)
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 512, "world": world, "shares": shares}

    def work() -> Any:
        model = Decoder(sizes).to(getattr(torch, dtype))
        model.init_weights(0)
        model.recompute = recompute
        if ranks == 1:
            optimizer = build_optimizer(config, model, World())
        else:  # as for ranks that are processes
            how: Any = {"betas": (0.9, 0.95), "weight_decay": 0.0, "max_grad_norm": 1.0, "fuse": fuse}
            optimizer = ShardedOptimizer(model, world=world, **how)
        for _ in range(2):
            loss = LossConfig()
            how = {"after_part": optimizer.accumulate, "backward": optimizer.backward}
            accumulate_policy_gradient(model, rows, loss, **how, **options)
            optimizer.step(1e-4)
        return model, optimizer

    plan = make_plan(config, sizes, ranks=ranks, device="cpu")
    assert plan.update - plan.copy == pytest.approx(peak_bytes(work), rel=0.1)


def lora(rank: int) -> list[str]:
    return [f"lora.rank={rank}", "model.path=x", "grpo.kl_coef=0"] if rank else []


def test_what_surely_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    config = load_config("deal", MODEL)
    own: dict[str, Any] = {"limits": (10**12, 10**12)}
    assert check_memory(config, **own) == ""
    with pytest.raises(MemoryError, match=r"needs .* GB on cpu at least"):
        check_memory(config, (10**4, 10**4))
    plan = make_plan(config, shape("Qwen3-0.6B"))
    assert plan.sure < plan.peak
    alone = make_plan(load_config("deal", MODEL), shape_of(config)).sure
    assert check_memory(config, (alone - 1, 10**12), ranks=2) == ""  # each has a part of the state
    assert "may take" in check_memory(config, (10**12, 10**6))  # never refused for what is free just now


def test_ranks_share_the_state_and_keep_the_weights() -> None:
    config = load_config("deal", [*MODEL, "model.dtype=bfloat16"])
    one, four = (make_plan(config, shape("Qwen3-4B"), ranks=n, device="cuda") for n in (1, 4))
    assert four.weights == one.weights
    assert four.masters == one.masters // 4
    assert four.moments == one.moments // 4
    assert four.gradients == one.gradients // 4
    assert one.parameters == 4_022_468_096  # as Hugging Face counts Qwen3-4B


ROOT = Path(__file__).parent.parent


def bench(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_readme_is_the_plans() -> None:
    assert bench("plan_table").table() in (ROOT / "README.md").read_text("utf-8")


def test_plan_says_whether_it_fits_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "collective-agency", "--model", "Qwen3-8B", "--json", "model.dtype=bfloat16"]
    assert main(words) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["fits"]
    assert told["change"]
    assert main([*words, "--gpu-memory", "12"]) == 1
    for change in json.loads(capsys.readouterr().out)["change"]:
        assert change.startswith("lora.rank=16 and ")
        less = change.replace(" and ", ", ").split(", ")
        assert main([*words, "--gpu-memory", "12", *less]) == 0, change
        capsys.readouterr()
    assert main([*words[:3], "Qwen3-32B", *words[4:], "--gpu-memory", "8"]) == 1
    assert all("more" in change for change in json.loads(capsys.readouterr().out)["change"])
    assert main([*words, "--ranks", "8", "train.tokens_per_microbatch=8192"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main([*words[:3], "nobody"]) == 2
    assert "Qwen3-8B" in capsys.readouterr().err


def test_a_queue_keeps_the_work_and_the_bound_of_list_scheduling() -> None:
    model, draws = bench("ranks_model"), random.Random(0)
    for _ in range(200):
        ranks = draws.randint(1, 8)
        lengths = [draws.randint(1, 1000) for _ in range(draws.randint(1, 40))]
        for busy in (model.queue(lengths, ranks), model.fixed(lengths, ranks)):
            assert sum(busy) == sum(lengths)
            assert max(busy) >= max(max(lengths), sum(lengths) / ranks)
        # Graham 1966: no list order ends later than the mean load and a share of the longest job
        most = sum(lengths) / ranks + (1 - 1 / ranks) * max(lengths)
        assert max(model.queue(lengths, ranks)) <= most + 1e-9


def test_ranks_add_up_and_what_lacks_is_said() -> None:
    answers, port = loopback()
    assert answers.ok
    assert reduction(2, port, "gloo", seconds=600).ok
    assert not devices(4, 0, 2).ok
    assert not devices(4, 2, 64).ok
    assert devices(2, 2, 1).ok
    lacking = space("disk", " here", 10, 100, "free some")
    assert not lacking.ok
    assert lacking.advice == "free some"
