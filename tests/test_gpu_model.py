"""bench/gpu_model.py and bench/gpu_count.py: their arithmetic against counts of others."""

from __future__ import annotations

import csv
import itertools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from duologue.kernels import ops
from duologue.model.decoder import Decoder, PackedAttention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench import common, gpu_count, gpu_model, models  # noqa: E402

SHAPE = {"hidden": 256, "inner": 384, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 128, "vocab": 640}
T = 256  # all sizes are whole tiles, where what is multiplied is what is asked for


def hidden_states(model: Decoder, device: str) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(T, dtype=torch.int64, device=device)
    positions = torch.arange(T, device=device) % (T // 2)
    lengths = torch.tensor([0, T // 2, T], dtype=torch.int32, device=device)
    return model.hidden(ids, positions, PackedAttention(lengths, model.scale, model.exact)), ids


def update(model: Decoder) -> None:
    hidden, ids = hidden_states(model, "meta")
    loss = ops.linear_policy_loss(hidden, model.head_weight, ids, lambda logp, *_: logp.sum())
    loss.loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_products_are_those_of_torchs_counter(tied: bool) -> None:
    """Of the definition in float64, whose products PyTorch makes."""
    plain = models.random_qwen3("cpu", torch.float64, **SHAPE, tied=tied)
    with FlopCounterMode(display=False) as counter:
        hidden, ids = hidden_states(plain, "cpu")
        torch.log_softmax(hidden @ plain.head_weight.T, 1).gather(1, ids[:, None]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    products = {name: flops for op, flops in found.items() if (name := op.__name__) in ("mm", "addmm")}
    ours = models.random_qwen3("meta", torch.bfloat16, **SHAPE, tied=tied)
    launches = gpu_count.counted(lambda: update(ours), [(T // 2, T // 2)] * 2)
    names = ("linear_kernel", "mm", "addmm")
    assert {launch.name for launch in launches} >= {*names, "attention_kernel", "grad_key_kernel"}
    assert sum(x.flops for x in launches if x.name in names) == sum(products.values()) > 0


def test_pairs_of_attention_are_those_of_its_tiles() -> None:
    """Counted one by one: of each tile of rows, the tiles of keys in which one of its rows sees one."""
    for n, before, R, rows, keys in itertools.product((1, 5, 33), (0, 7, 40), (1, 3), (4, 16), (8, 16)):
        visible = {
            (x // rows, key // keys)
            for x in range(n * R)
            for key in range(before + n)
            if key <= before + x // R
        }
        assert gpu_count.tile_pairs([(n, before + n)], R, rows, keys) == len(visible) * rows * keys


@pytest.mark.parametrize("exact", [True, False])
def test_bytes_of_a_decode_step(exact: bool) -> None:
    """Of the linears: each weight once, what goes in and what comes out; of attention: the cache once."""
    model = models.random_qwen3("meta", torch.bfloat16, **SHAPE)
    model.use_exact(exact)
    launches = gpu_model.decode(model)
    M = gpu_model.ROWS
    weights = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    H, I, Q, G = 256, 384, 4 * 128, 2 * 128
    rows = (
        (H + Q + 2 * G) + (Q + H) + (H + I) + (I + H)
    )  # q, k and v; o; gate and up, whose input is read once
    expected = sum(2 * p.numel() for p in weights) + 2 * 2 * M * rows
    head = model.head_weight
    names = ("linears_kernel", "gate_up_kernel", "linear_kernel", "mm")
    found = sum(x.bytes for x in launches if x.name in names)  # without exact the sampler has the head
    of_head = 2 * head.numel() + M * (2 * head.shape[1] + 4 * head.shape[0])
    assert found == expected + (of_head if exact else 0)
    reads = 2 * 2 * gpu_model.CONTEXT * M * 2 * 128  # keys and values of two heads
    chunks = M * 4 * gpu_model.CONTEXT // 256  # of query heads: each reads its query and has a state
    states = chunks * (128 * 4 + 8)
    attention = [x for x in launches if x.name == "decode_attention_kernel"]
    assert [x.bytes for x in attention] == [reads + chunks * 128 * 2 + states] * 2
    merges = [x for x in launches if x.name == "merge_kernel"]
    assert [x.bytes for x in merges] == [states + M * 4 * 128 * 2] * 2
    written = 2 * M * 2 * (Q + 2 * G) + M * 128 * 4  # and a row of cosines and one of sines
    assert [x.bytes for x in launches if x.name == "rotate_write_kernel"] == [written] * 2


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("exact", [True, False])
def test_a_layer_is_nine_launches_at_most(rank: int, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a decode step; an adapter adds two to each of its seven linears, of which q, k and v have the first
    in common, and undoes the gate's fusion."""
    monkeypatch.setitem(gpu_model.QWEN3, "tiny", (256, 384, 2, 8))
    found = gpu_model.launches_of_layer("tiny", rank, exact)
    assert found["linears_kernel"] == (2 if rank else 1)
    assert found["rotate_write_kernel"] == 1
    assert found["decode_attention_kernel"] == found["merge_kernel"] == 1
    assert found.total() <= (9 if not rank else 9 + 2 + 2 * 7 - 2)


def test_trained_parameters() -> None:
    """Of the 0.6B, by its checkpoint: 596,049,920."""
    assert gpu_model.stepping("0.6B", 0) == 596_049_920 * 46


def test_layers_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted with one and two layers is what three have."""
    monkeypatch.setitem(gpu_model.QWEN3, "tiny", (256, 384, 3, 8))
    for run in (gpu_model.decode, gpu_model.prefill, gpu_model.gradient):
        whole = gpu_model.whole(run, "tiny", 4, True, 1e-6)
        direct = gpu_model.cost(run(gpu_model.model_of("tiny", 3, 4, True)), 1e-6)
        assert whole == pytest.approx(direct)
        assert whole[:2] == direct[:2]


def test_seconds_of_a_launch() -> None:
    hbm, flops, sms = gpu_model.HBM, gpu_model.FLOPS, gpu_model.MULTIPROCESSORS
    assert gpu_model.roofline(gpu_count.Launch("x", hbm, flops / 2)) == 1.0
    assert gpu_model.roofline(gpu_count.Launch("x", hbm / 4, 3 * flops)) == 3.0
    assert gpu_model.predicted(gpu_count.Launch("x", hbm)) == 1 / gpu_model.OTHERS
    assert gpu_model.predicted(gpu_count.Launch("x", 0.0)) == gpu_model.SHORTEST
    # All blocks together ask the cache for what it gives in a second; or one more than there are
    # multiprocessors, so that one has two, each of what it gives one in a second; or gives them to multiply.
    share = gpu_model.SHARES["linear_kernel"]
    cached = gpu_count.Launch("linear_kernel", 0.0, 0.0, 2 * sms, gpu_model.CACHE / (2 * sms))
    assert gpu_model.predicted(cached) == pytest.approx(1.0)
    few = gpu_count.Launch("linear_kernel", 0.0, 0.0, 3, gpu_model.CACHE_ONE)
    assert gpu_model.predicted(few) == pytest.approx(1.0)
    blocks = gpu_count.Launch("linear_kernel", 0.0, (sms + 1) * flops / sms, sms + 1, 1.0)
    assert gpu_model.predicted(blocks) == pytest.approx(2.0 / share)
    total = gpu_model.cost([gpu_count.Launch("x", hbm), blocks], 0.5)
    assert total.predicted == pytest.approx(1 / gpu_model.OTHERS + 2.0 / share + 2 * 0.5)
    assert (total.launches, total.ours, total.bytes) == (2, 1, hbm)


def test_items_that_wait_in_turn() -> None:
    """Decode attention against a simulation: on a multiprocessor two blocks wait and read in turn, one reads
    at a time, all for exponential times."""
    reading = 2 * gpu_model.ITEM_WAITS
    programs = 40_000 * gpu_model.MULTIPROCESSORS
    loads = reading * gpu_model.HBM / gpu_model.MULTIPROCESSORS
    seconds = gpu_model.streamed(gpu_count.Launch("decode_attention_kernel", 0.0, 0.0, programs, loads))
    draw = random.Random(0).expovariate
    arrives = [0.0, 0.0]
    free = 0.0
    for _ in range(40_000):
        block = arrives.index(min(arrives))
        free = max(free, arrives[block]) + draw(1 / reading)
        arrives[block] = free + draw(1 / gpu_model.ITEM_WAITS)
    assert seconds == pytest.approx(free, rel=0.02)


def test_the_host_is_covered_by_the_last_steps_of_a_call() -> None:
    step = gpu_model.HOST_STEP * gpu_model.STEPS / gpu_model.HELD
    assert gpu_model.uncovered(step) == gpu_model.uncovered(2 * step) == 0
    assert gpu_model.uncovered(step / 2) == pytest.approx(gpu_model.HOST_STEP / 2)
    assert gpu_model.uncovered(0.0) == gpu_model.HOST_STEP


def test_rows_are_written_and_stand_beside_the_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    fixed = gpu_model.Cost(600, 400, 2e10, 1e12, 0.01, 0.02)
    monkeypatch.setattr(gpu_model, "whole", lambda *_: fixed)
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--models", "0.6B", "--save"])
    gpu_model.main()
    printed = capsys.readouterr().out
    text = (tmp_path / "gpu_model.csv").read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") == 1 + 12
    rows = list(csv.DictReader(text.decode().splitlines()))
    assert {row["kind"] for row in rows} == {"predicted"}
    full = [row for row in rows if row["rank"] == "0" and row["exact"] == "True"]
    assert [row["goal"] for row in full] == ["48000", "", "120000"]
    for row in rows:
        assert int(row["predicted_tokens_per_s"]) < int(row["roofline_tokens_per_s"])
        assert f"{int(row['predicted_tokens_per_s']):,}" in printed
