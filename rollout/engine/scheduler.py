"""Decides what one engine step computes. Plain Python on numbers: no torch here.

A request is always "some tokens whose KV is missing, then one sample". Decoding is the case of one missing
token, so prefill, chunked prefill, decode and recompute after preemption are one thing, and they mix freely
in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from duologue.rollout.engine.pages import PagePool
from duologue.rollout.engine.sequence import BranchState, Request


@dataclass(kw_only=True, slots=True)
class Stats:
    """Counters since the engine was made."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0  # running requests that gave up their pages
    evictions: int = 0  # idle branches that gave up their pages
    peak_pages: int = 0
    shared_tokens: int = 0  # whose KV was found in another branch's pages
    slot_steps: int = 0  # steps times the most requests that ran at once since the engine was last idle
    idle_slot_steps: int = 0  # of these, places that no request took
    waited_seconds: float = 0.0  # blocked in the host syncs of several steps


@dataclass(slots=True)
class Work:
    """One request's share of a step: KV for `n_tokens` tokens, and a sample if that completes the context."""

    request: Request
    n_tokens: int
    samples: bool


class Scheduler:
    """Continuous batching: admit while pages are free, and take pages back when they run out.

    Who may have the most to do is admitted first, so that the long ones do not run alone at the end; equals
    keep their order, which keeps a group together. Pages are taken first from idle branches (the longest
    unused first), then from waiting requests, then from the youngest running request. Whoever loses its pages
    is recomputed later, with the same result.
    """

    def __init__(
        self, pool: PagePool, max_batch: int, max_step_tokens: int, branches: Iterable[BranchState]
    ) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.max_step_tokens = max_step_tokens
        self.stats = Stats()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._branches = branches  # every open branch, in order of last use
        self._sorted = True
        self._slots = 0

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        if not self.busy:
            self._slots = 0
        self.waiting.append(request)
        self._sorted = False

    def drop(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)

    def plan(self) -> list[Work]:
        """The next step's work, rows that share a prefix side by side: attention reads what they share once.

        Never empty while there is a request, since each alone fits the pool (checked at its start).
        """
        works: list[Work] = []
        budget = self.max_step_tokens
        page_size = self.pool.page_size
        if max([r.n_todo for r in self.running], default=0) > 1:
            self.running.sort(key=lambda r: r.n_todo > 1)  # decode first: every dialogue waits for it
        queue = deque(self.running)
        while queue and budget > 0:
            request = queue.popleft()
            branch = request.branch
            n_todo = request.n_todo
            n = n_todo if n_todo <= budget else budget
            fits = branch.n_cached + n <= len(branch.pages) * page_size
            if fits or self._grow_or_preempt(request, n, queue):
                works.append(Work(request, n, n == n_todo and not request.prefill_only))
                budget -= n
        if self.waiting and not queue:
            self._admit(works, budget)
        assert works or not self.busy, "no request fits the pool"
        self._count(works)
        works.sort(key=lambda w: w.request.branch.pages[0])
        return works

    def _grow_or_preempt(self, request: Request, n: int, queue: deque[Request]) -> bool:
        """Pages for `n` tokens of a running request, taken from the last of `queue` where none are left.

        False when the request lost its own pages in the end.
        """
        while not self.grow(request.branch, n):
            victim = queue.pop() if queue else request
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit(self, works: list[Work], budget: int) -> None:
        if not self._sorted:
            self.waiting = deque(sorted(self.waiting, key=lambda r: (not r.preempted, -r.expected)))
            self._sorted = True
        next_keys = (self.pool.next_key(w.request.branch) for w in works)
        coming = {key for key in next_keys if key is not None}
        later: list[Request] = []  # whose next page is computed for another one in this step
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            request = self.waiting[0]
            self.stats.shared_tokens += self.pool.find_shared(request.branch)
            key = self.pool.next_key(request.branch)
            if key in coming and works:
                later.append(self.waiting.popleft())
                continue
            n = min(request.n_todo, budget)
            if not self.grow(request.branch, n):
                break
            if key is not None and n >= self.pool.page_size:
                coming.add(key)
            self.running.append(self.waiting.popleft())
            works.append(self._work(request, n))
            budget -= n
        self.waiting.extendleft(reversed(later))

    def _count(self, works: list[Work]) -> None:
        self._slots = max(self._slots, len(works))
        decode = sum(w.n_tokens == 1 and w.samples for w in works)
        self.stats.steps += bool(works)
        self.stats.decode_tokens += decode
        self.stats.prefill_tokens += sum(w.n_tokens for w in works) - decode
        self.stats.slot_steps += self._slots
        self.stats.idle_slot_steps += self._slots - len(works)

    def count_ahead(self, n: int, steps: int, taken: int) -> None:
        """`n` rows took `taken` tokens in `steps` steps, of which `plan` counted the first.

        Rows that stopped before the last step are idle in the others.
        """
        slots = (steps - 1) * self._slots
        self.stats.steps += steps - 1
        self.stats.decode_tokens += taken - n
        self.stats.slot_steps += slots
        self.stats.idle_slot_steps += slots - (taken - n)

    def _work(self, request: Request, n: int) -> Work:
        return Work(request, n, n == request.n_todo and not request.prefill_only)

    def _preempt(self, victim: Request) -> None:
        self.stats.preemptions += 1
        self.running.remove(victim)
        victim.preempted = True
        victim.ahead = 0
        self.waiting.appendleft(victim)
        self.pool.release(victim.branch)

    def reserve(self, wanted: Iterable[tuple[BranchState, int]]) -> bool:
        """Pages for so many more tokens of each; False when that is not enough."""
        page_size = self.pool.page_size
        for branch, n in wanted:
            fits = branch.n_cached + n <= len(branch.pages) * page_size
            if not fits and not self.grow(branch, n):
                return False
        return True

    def grow(self, branch: BranchState, n_tokens: int) -> bool:
        """Pages for `n_tokens` more tokens, evicting those who do not run; False when that is not enough."""
        missing = self.pool.pages_for(branch.n_cached + n_tokens) - len(branch.pages)
        if missing <= 0:
            return True
        while (taken := self.pool.take(missing)) is None:
            if not self._evict(keep=branch):
                return False
        branch.pages.extend(taken)
        self.stats.peak_pages = max(self.stats.peak_pages, self.pool.n_pages - self.pool.n_free)
        return True

    def _evict(self, keep: BranchState) -> bool:
        idle = (b for b in self._branches if b.request is None and b.pages)
        waiting = (r.branch for r in reversed(self.waiting) if r.branch.pages and r.branch is not keep)
        victim = next(idle, None) or next(waiting, None)
        if victim is None:
            return False
        self.stats.evictions += 1
        self.pool.release(victim)
        return True
