"""Decides what one engine step computes. Plain Python on numbers: no torch here.

A request is always "some tokens whose KV is missing, then one sample". Decoding is the case of one missing token, so prefill,
chunked prefill, decode and recompute after preemption are one thing, and they mix freely in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from duologue.rollout.engine.pages import Key, PagePool
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
    shared_tokens: int = 0  # whose KV was found in another branch's pages
    slot_steps: int = 0  # steps times the most requests that ran at once since the engine was last idle
    idle_slot_steps: int = 0  # of these, places that no request took
    waited_seconds: float = 0.0  # for the device, while several steps ran without a look in between


@dataclass(kw_only=True, slots=True)
class Work:
    """One request's share of a step: compute KV for `n_tokens` tokens, and sample if that completes the context."""

    request: Request
    n_tokens: int
    samples: bool


class Scheduler:
    """Continuous batching: admit while there is room, and take pages back when they run out.

    Who may have the most to do is admitted first, so that the long ones do not run alone at the end; equals keep their order, which
    keeps a group together. Pages are taken first from idle branches (the longest unused first), then from waiting requests, then
    from the youngest running request. Whoever loses its pages is recomputed later, with the same result.
    """

    def __init__(
        self, pool: PagePool, max_batch: int, max_step_tokens: int, branches: Iterable[Branch]
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

    def plan(self, version: int) -> list[Work]:
        """The next step's work; never empty while there is a request, since each alone fits the pool (checked at start)."""
        works: list[Work] = []
        budget = self.max_step_tokens
        self.running.sort(key=lambda r: r.n_todo > 1)  # decode first: its latency is every dialogue's latency
        queue = deque(self.running)
        while queue and budget > 0:
            request = queue.popleft()
            n = min(request.n_todo, budget)
            while not self.grow(request.branch, n, version):
                victim = queue.pop() if queue else request
                self._preempt(victim)
                if victim is request:
                    break
            else:
                works.append(self._work(request, n))
                budget -= n
        if self.waiting and not queue:
            self._admit(works, budget, version)
        assert works or not self.busy, "no request fits the pool"
        self._count(works)
        works.sort(
            key=lambda w: w.request.branch.pages[0]
        )  # rows that share a prefix lie together: attention reads it once
        return works

    def _admit(self, works: list[Work], budget: int, version: int) -> None:
        if not self._sorted:
            self.waiting = deque(sorted(self.waiting, key=lambda r: (not r.preempted, -r.expected)))
            self._sorted = True
        coming = {key for w in works if (key := self._next_key(w.request.branch, version)) is not None}
        later: list[Request] = []  # whose next page is computed for another one in this step
        while self.waiting and len(self.running) < self.max_batch and budget > 0:
            request = self.waiting[0]
            self.find_shared(request, version)
            key = self._next_key(request.branch, version)
            if key in coming and works:
                later.append(self.waiting.popleft())
                continue
            n = min(request.n_todo, budget)
            if not self.grow(request.branch, n, version):
                break
            if key is not None and n >= self.pool.page_size:
                coming.add(key)
            self.running.append(self.waiting.popleft())
            works.append(self._work(request, n))
            budget -= n
        self.waiting.extendleft(reversed(later))

    def _next_key(self, branch: Branch, version: int) -> Key | None:
        """Of the page that a branch at a page boundary fills next; None when its ids do not fill one."""
        size, at = self.pool.page_size, branch.n_cached
        if at % size or len(branch.token_ids) <= at + size:
            return None
        return (
            version,
            branch.pages[-1] if branch.pages else -1 - branch.adapter,
            tuple(branch.token_ids[at : at + size]),
        )

    def find_shared(self, request: Request, version: int) -> None:
        """Take over pages of other branches as far as the ids agree; the last token is left, it must be computed to sample."""
        branch, size = request.branch, self.pool.page_size
        while (key := self._next_key(branch, version)) is not None and (
            page := self.pool.find(key)
        ) is not None:
            self.pool.share([page])
            branch.pages.append(page)
            branch.n_cached += size
            self.stats.shared_tokens += size

    def computed(self, branch: Branch, n_tokens: int, version: int) -> None:
        """`n_tokens` more of a branch's tokens have their KV: name the pages that this filled."""
        size, before = self.pool.page_size, branch.n_cached // self.pool.page_size
        branch.n_cached += n_tokens
        for i in range(before, branch.n_cached // size):
            key = (
                version,
                branch.pages[i - 1] if i else -1 - branch.adapter,
                tuple(branch.token_ids[i * size : (i + 1) * size]),
            )
            branch.pages[i] = self.pool.name(branch.pages[i], key)

    def _count(self, works: list[Work]) -> None:
        stats, n = self.stats, len(works)
        self._slots = max(self._slots, n)
        decode = sum(w.n_tokens == 1 and w.samples for w in works)
        stats.steps += bool(works)
        stats.decode_tokens += decode
        stats.prefill_tokens += sum(w.n_tokens for w in works) - decode
        stats.slot_steps += self._slots
        stats.idle_slot_steps += self._slots - n

    def count_ahead(self, n: int, steps: int, taken: int) -> None:
        """`n` rows took `taken` tokens in `steps` steps, of which `plan` counted one; rows that stopped before are idle."""
        stats, more = self.stats, (steps - 1) * self._slots
        stats.steps += steps - 1
        stats.decode_tokens += taken - n
        stats.slot_steps += more
        stats.idle_slot_steps += more - (taken - n)

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
        victim.preempted = True
        self.waiting.appendleft(victim)
        self.release(victim.branch)

    def grow(self, branch: Branch, n_tokens: int, version: int) -> bool:
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
