"""What the host does in the GPU's decode loop: bench/gpu_host.py, its copies, and how draws are split."""

from __future__ import annotations

import json
import random
import sys
from array import array
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from duologue.kernels import backend
from duologue.rollout.engine import decode_gpu
from duologue.rollout.engine.decode import DecodedSteps
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import gpu_host


def test_the_bench_enters_what_was_drawn(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """It asserts that every row took every step."""
    monkeypatch.setattr(sys, "argv", ["gpu_host", "--rows", "5", "--context", "70", "--calls", "2", "--json"])
    threads = torch.get_num_threads()
    gpu_host.main()
    torch.set_num_threads(threads)
    row = json.loads(capsys.readouterr().out)
    assert row["rows"] == 5
    assert 0 < row["least_ms"] <= row["step_ms"]


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("copy_", "_to_copy", "_local_scalar_dense"):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_call_has_one_copy_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared groups among what is sent; on CUDA each copy is a round through the driver."""
    engine = gpu_host.engine_of(16, 1100, 3)
    engine._runner.loop.held = 0
    monkeypatch.setattr(backend, "triton", lambda x: True)
    monkeypatch.setattr(decode_gpu.DeviceLoop, "_step_of", gpu_host.stubbed)
    engine.step()
    loop: Any = engine._runner.loop
    (bucket,) = loop._buckets.values()
    assert bucket.groups is not None
    before = [len(branch) for branch in engine._branches]
    with Copies() as copies:
        engine.step()
    assert copies.names == ["copy_", "_to_copy"]
    assert [len(branch) for branch in engine._branches] == [n + gpu_host.STEPS for n in before]


@pytest.mark.parametrize("seed", range(3))
def test_draws_of_a_row_are_those_of_its_steps(seed: int) -> None:
    """Supports of several sizes, some of them not known, laid step by step."""
    draws = random.Random(seed)
    k, n = 5, 4
    sizes = [[draws.choice([-1, 0, 0, 1, 3]) if seed else 0 for _ in range(n)] for _ in range(k)]
    supports = [[[draws.randrange(99) for _ in range(max(size, 0))] for size in row] for row in sizes]
    tokens = np.array([[draws.randrange(99) for _ in range(n)] for _ in range(k)])
    logprobs, entropies = (np.array(tokens / scale, np.float32) for scale in (-7, 3))
    flat = np.array([token for row in supports for ids in row for token in ids], np.int32)
    decoded = DecodedSteps(tokens, logprobs, entropies, np.array(sizes), flat, candidate_logprobs={2: [0.5]})
    for row, found in enumerate(decoded.rows()):
        assert found.tokens == [int(tokens[step, row]) for step in range(k)]
        assert found.logprobs == [float(logprobs[step, row]) for step in range(k)]
        assert found.entropies == [float(entropies[step, row]) for step in range(k)]
        assert found.support_sizes == [sizes[step][row] for step in range(k)]
        assert found.support_ids == array("i", [t for step in range(k) for t in supports[step][row]])
        unknown = [step for step in range(k) if sizes[step][row] < 0]
        assert found.n_known == min(unknown, default=k)
        assert list(found.candidate_logprobs) == ([0.5] if row == 2 else [])


def test_settings_are_made_anew_where_the_requests_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gpu_host.engine_of(3, 40, 3)
    loop: Any = engine._runner.loop
    monkeypatch.setattr(decode_gpu.DeviceLoop, "_step_of", gpu_host.stubbed)
    made: list[int] = []
    settings = decode_gpu.settings_arrays
    with mock.patch.object(decode_gpu, "settings_arrays", lambda r, B: made.append(len(r)) or settings(r, B)):
        engine.step()
        engine.step()
        assert made == [3]
        engine.cancel(engine._scheduler.running[1])
        engine.step()
    assert made == [3, 2]
    seeds = [request.seed for request in engine._scheduler.running]
    (bucket,) = [b for key, b in loop._buckets.items() if key[0][0] == 2]
    assert bucket.rows.seed.tolist() == seeds
