"""Decides what one engine step computes. Plain Python on numbers: no torch here.

A request is always "some tokens whose KV is missing, then one sample". Decoding is the case of one missing token, so prefill,
chunked prefill, decode and recompute after preemption are one thing, and they mix freely in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from duologue.rollout.engine.pages import PagePool
from duologue.rollout.engine.sequence import Branch, Request


@dataclass(kw_only=True, slots=True)
class Stats:
    """Counters since the engine was made."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0  # running requests that gave up their pages
    evictions: int = 0  # idle branches that gave up their pages
    peak_pages: int = 0


@dataclass(kw_only=True, slots=True)
class Work:
    """One request's share of a step: compute KV for `n_tokens` tokens, and sample if that completes the context."""

    request: Request
    n_tokens: int
    samples: bool


class Scheduler:
    """Continuous batching: admit while there is room, and take pages back when they run out.

    Pages are taken first from idle branches (the longest unused first), then from waiting requests, then from the youngest
    running request. Whoever loses its pages is recomputed later, with the same result.
    """

    def __init__(self, pool: PagePool, max_batch: int, max_step_tokens: int, branches: Iterable[Branch]) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.stats = Stats()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._branches = branches  # every open branch, in order of last use

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def plan(self, version: int) -> list[Work]:
        """The next step's work; never empty while there is a request, since each alone fits the pool (checked at start)."""
        works: list[Work] = []
        budget = self.max_step_tokens
        self.running.sort(key=lambda r: r.n_todo > 1)  # decode first: its latency is every dialogue's latency
        queue = deque(self.running)
        while queue and budget > 0:
            request = queue.popleft()
            n = min(request.n_todo, budget)
            while not self._grow(request.branch, n, version):
                victim = queue.pop() if queue else request
                self._preempt(victim)
                if victim is request:
                    break
            else:
                works.append(self._work(request, n))
                budget -= n
        while self.waiting and not queue and len(self.running) < self.max_batch and budget > 0:
            request = self.waiting[0]
            n = min(request.n_todo, budget)
            if not self._grow(request.branch, n, version):
                break
            self.running.append(self.waiting.popleft())
            works.append(self._work(request, n))
            budget -= n
        assert works or not self.busy, "no request fits the pool"
        return works

    def _work(self, request: Request, n: int) -> Work:
        return Work(request=request, n_tokens=n, samples=n == request.n_todo and not request.prefill_only)

    def release(self, branch: Branch) -> None:
        """Give all pages of a branch back; its ids stay."""
        self.pool.give_back(branch.pages)
        branch.pages = []
        branch.n_cached = 0

    def _preempt(self, victim: Request) -> None:
        self.stats.preemptions += 1
        self.running.remove(victim)
        self.waiting.appendleft(victim)
        self.release(victim.branch)

    def _grow(self, branch: Branch, n_tokens: int, version: int) -> bool:
        """Pages for `n_tokens` more tokens, evicting those who do not run; False when that is not enough."""
        missing = self.pool.pages_for(branch.n_cached + n_tokens) - len(branch.pages)
        if missing <= 0:
            return True
        while (taken := self.pool.take(missing, version)) is None:
            if not self._evict(keep=branch):
                return False
        branch.pages.extend(taken)
        self.stats.peak_pages = max(self.stats.peak_pages, self.pool.n_pages - self.pool.n_free)
        return True

    def _evict(self, keep: Branch) -> bool:
        idle = (b for b in self._branches if b.request is None and b.pages)
        waiting = (r.branch for r in reversed(self.waiting) if r.branch.pages and r.branch is not keep)
        victim = next(idle, None) or next(waiting, None)
        if victim is None:
            return False
        self.stats.evictions += 1
        self.release(victim)
        return True
