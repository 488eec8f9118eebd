"""The fused head under DDP and FSDP2: two processes with unequal shares of a batch get the gradient of the
whole batch."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("parallel_worker.py")


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_gradients_are_synchronised(mode: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
    assert spec is not None
    assert spec.loader is not None
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    errors = [tmp_path / f"errors{rank}" for rank in range(worker.WORLD)]
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), mode, str(tmp_path)], stderr=path.open("wb")
        )
        for rank, path in enumerate(errors)
    ]
    try:  # a rank that fails leaves the other waiting: look at all, and say what the first to fail said
        deadline = time.monotonic() + 240
        while any(process.poll() is None for process in running) and not any(
            process.poll() for process in running
        ):
            assert time.monotonic() < deadline, [path.read_text()[-1500:] for path in errors]
            time.sleep(0.05)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert [process.returncode for process in running] == [0] * worker.WORLD, [
        path.read_text()[-1500:] for path in errors
    ]
    policy = worker.Policy()
    token_ids, targets, advantage = worker.batch()
    logits = torch.tanh(policy.body(policy.embedding(token_ids))) @ policy.embedding.weight.t()
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(1)
    (-(advantage * logp.gather(1, targets[:, None])[:, 0] + 0.01 * entropy).sum() / worker.N).backward()
    for rank in range(worker.WORLD):
        found = torch.load(tmp_path / f"grads{rank}.pt")
        assert found.keys() == {name for name, _ in policy.named_parameters()}
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
