"""Enters what a step computed and drew into requests, their branches and the pool's books."""

from __future__ import annotations

from collections.abc import Callable

from duologue.rollout.engine.checks import says_stop
from duologue.rollout.engine.pages import PagePool
from duologue.rollout.engine.scheduler import Work
from duologue.rollout.engine.sequence import Draws


def enter_prefill(work: Work, pool: PagePool) -> int:
    """The KV of a work that draws nothing; the steps that count."""
    request = work.request
    pool.computed(request.branch, work.n_tokens)
    request.done = request.prefill_only and request.n_todo == 0
    return 1


def enter_draws(work: Work, draws: Draws, pool: PagePool, decode: Callable[[list[int]], str] | None) -> int:
    """One work's KV and draws as far as they count; the steps that do."""
    request = work.request
    completion = request.completion
    if completion.error:
        pool.computed(request.branch, work.n_tokens)
        request.finish("error")
        return 1
    tokens = draws.tokens
    n = drawn = len(tokens)
    if -1 in draws.support_sizes:
        n = draws.n_known
    n_left = request.n_left
    reason = ""
    if n >= n_left:
        n = n_left
        reason = "length"
    if not request.stop_token_ids.isdisjoint(tokens):
        stop = next((i for i in range(n) if tokens[i] in request.stop_token_ids), None)
        if stop is not None:
            n = stop + 1
            reason = "stop"
    if n < drawn:
        draws.keep(n)
    completion.add(draws)
    request.branch.token_ids += tokens
    pool.computed(request.branch, n * work.n_tokens)
    strings = request.params.stop_strings
    if strings and says_stop(completion.token_ids, strings, decode):
        reason = "stop"
    if reason:
        request.finish(reason)
    request.plain = not reason and n < drawn  # its whole support is drawn by a step of its own
    return n
