"""One of two processes that share a batch under DDP or FSDP2; started by tests/test_parallel.py with RANK,
MODE and a folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from duologue.kernels import ops
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

N, H, V, WORLD = 48, 16, 130, 2


class Policy(nn.Module):
    """A head tied to its embedding, so that the loss' gradient of the weight meets another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)

    def forward(self, token_ids: Tensor, targets: Tensor, advantage: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(token_ids)))

        def loss_fn(logp: Tensor, entropy: Tensor, rows: slice) -> Tensor:
            return -(advantage[rows] * logp + 0.01 * entropy).sum() / N

        return ops.linear_policy_loss(
            hidden, self.embedding.weight, targets, loss_fn, chunk_bytes=7 * V * 4
        ).loss


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    advantage = torch.randn(N, generator=generator) * (torch.arange(N) % 3 > 0)
    return (
        torch.randint(0, V, (N,), generator=generator),
        torch.randint(0, V, (N,), generator=generator),
        advantage,
    )


def main() -> None:
    rank, mode, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    policy: nn.Module = Policy()
    if mode == "ddp":
        policy = DistributedDataParallel(policy)
    else:
        fully_shard(policy, mesh=dist.device_mesh.init_device_mesh("cpu", (WORLD,)))
    part = [
        x[: N // 3] if rank == 0 else x[N // 3 :] for x in batch()
    ]  # unequal shares; both kinds average over ranks
    (policy(*part) * WORLD).backward()
    grads = {name.removeprefix("module."): p.grad for name, p in policy.named_parameters()}
    whole = {name: g if mode == "ddp" else g.full_tensor() for name, g in grads.items() if g is not None}
    torch.save(whole, folder / f"grads{rank}.pt")
    dist.barrier()  # the other rank has all that it waits for
    # Without destructors: DDP's reducer ends the process group while it holds the interpreter lock, which
    # gloo's worker thread may be waiting for to drop its last all-reduce, and then neither ever goes on
    # (torch 2.13).
    os._exit(0)


if __name__ == "__main__":
    main()
