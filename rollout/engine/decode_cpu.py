"""Decoding k steps in one call of the C++ kernels, which ends early when a row stops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from duologue.kernels.paged_decoder import PagedDecoder
from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter
from duologue.rollout.engine.decode import DecodedSteps, DecodeLoop, Read, page_table, sampling_settings
from duologue.rollout.engine.sequence import Request


class NativeLoop(DecodeLoop):
    """For requests without an adapter: the kernels know none."""

    def __init__(
        self, model: Decoder, layers: PagedDecoder, adapters: Sequence[Adapter | None], steps: int
    ) -> None:
        super().__init__(model, adapters, steps)
        self.layers = layers

    def forget(self) -> None:
        """Nothing was made for an adapter."""

    def takes(self, requests: Sequence[Request]) -> bool:
        return super().takes(requests) and self.adapters[requests[0].branch.adapter] is None

    def reach(self, left: Sequence[int]) -> int:
        """Until the first one ends."""
        return min(self.steps, *left)

    def run(self, requests: Sequence[Request], steps: int) -> Read:
        assert self.kv is not None
        branches = [r.branch for r in requests]
        position = torch.tensor([b.n_cached + 1 for b in branches])
        tokens, logprobs, entropies, support_sizes, support_ids = self.layers.decode(
            self.model.head_weight,
            (*sampling_settings(requests), position),
            torch.tensor([b.token_ids[-1] for b in branches]),
            *self.model.rotary_tables(position + (steps - 2)),
            self.kv,
            torch.from_numpy(page_table(branches)),
            [r.stop_token_ids for r in requests],
            steps,
        )
        numbers = (tokens.numpy(), logprobs.numpy(), entropies.numpy())
        decoded = DecodedSteps(*numbers, support_sizes.numpy(), support_ids.numpy())
        return lambda: decoded
