"""Sets of weights beside the policy's, each with an engine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from duologue.grpo.build import build_engine
from duologue.grpo.config import Config
from duologue.grpo.policy import load_beside, restore_weights
from duologue.model.decoder import Decoder
from duologue.rollout.engine.engine import Engine
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.engine.runner import token_bytes


class HeldWeights:
    """Holds up to `most` earlier selves of `model`. Once there are so many, the least recently used is
    written over, in place: its engine and KV pool stay.
    """

    def __init__(self, config: Config, model: Decoder, most: int) -> None:
        self.config, self.model, self.most = config, model, most
        self._engines: dict[int, Engine] = {}  # by the step of the snapshot, the least recently used first
        self._reference: Engine | None = None

    @property
    def engines(self) -> list[Engine]:
        return list(self._engines.values())

    def use(self, paths: Mapping[int, Path], reference: Decoder | None = None) -> dict[int, Engine]:
        """Engines on the snapshots in these folders. `reference` has the weights of step 0 where others have
        loaded them: it takes one of the places, and is never written over.
        """
        if reference is not None and self._reference is None:
            self._reference = self._engines[0] = self._build(reference)
        for step in paths:
            if step in self._engines:
                self._engines[step] = self._engines.pop(step)  # now the most recently used
        for step, path in paths.items():
            if step not in self._engines:
                self._engines[step] = self._load(path)
        assert len(self._engines) <= self.most
        return {step: self._engines[step] for step in paths}

    def _load(self, path: Path) -> Engine:
        if len(self._engines) < self.most:
            return self._build(load_beside(self.model, path))
        oldest = next(step for step, engine in self._engines.items() if engine is not self._reference)
        engine = self._engines.pop(oldest)
        restore_weights(engine.model, path)
        return engine

    def forget_after(self, step: int) -> None:
        """Snapshots that were taken later are to be read again; their engines are written over first."""
        stale = [engine for taken, engine in self._engines.items() if taken > step]
        kept = {taken: engine for taken, engine in self._engines.items() if taken <= step}
        lowest = min([0, *kept])  # of nobody's step, below those of an earlier call
        self._engines = {lowest - 1 - n: engine for n, engine in enumerate(stale)} | kept

    def _build(self, model: Decoder) -> Engine:
        return build_engine(self.config, model, CACHE_TOKENS)  # the policy's pool took what was free


def memory(config: Config, model: Decoder) -> str:
    """What a set of such weights takes, with its KV pool, in words."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pool = (config.rollout.cache_tokens or CACHE_TOKENS) * token_bytes(model)
    return f"{weights / 2**20:,.1f} MiB of weights and {pool / 2**20:,.1f} MiB of KV pool"
