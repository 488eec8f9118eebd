"""The rollout engine: many live sequences on one set of weights, with paged KV and continuous batching.

    engine = Engine(model)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=64, stop_token_ids=(2,)))

    branch = engine.open(prompt)                    # or keep a dialogue's KV between turns
    reply = branch.generate(params)
    branch.append(other_side)
    reply = branch.generate(params)

On CPU the log-probs are those of `duologue.model.decoder.score` to the bit, whatever batch, fork or turn.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import replace

from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, LoraDecoder
from duologue.rollout.engine.checks import (
    allowed_ids,
    check_fits,
    check_ids,
    check_sizes,
    check_stop_strings,
    plain_ids,
)
from duologue.rollout.engine.decode import DecodedSteps, Read
from duologue.rollout.engine.entry import enter_draws, enter_prefill
from duologue.rollout.engine.pages import CACHE_TOKENS, PagePool
from duologue.rollout.engine.runner import Runner, measured_tokens
from duologue.rollout.engine.scheduler import Scheduler, Stats, Work
from duologue.rollout.engine.sequence import BranchState, Completion, Request, SamplingParams
from duologue.rollout.engine.writes import writes


class Branch(BranchState):
    """The handle of a live sequence, whose KV stays between turns. `append` and `rewind` cost nothing."""

    __slots__ = ("engine",)

    def __init__(self, engine: Engine, token_ids: Ids[int], adapter: int = 0) -> None:
        super().__init__(list(token_ids), adapter)
        self.engine: Engine | None = engine

    def append(self, token_ids: Ids[int]) -> None:
        """Add ids that were not sampled here: the other side's turn, a template fragment."""
        token_ids = plain_ids(token_ids)
        check_ids(token_ids, self._idle_engine("append").model.config.vocab_size)
        self.token_ids.extend(token_ids)

    def generate(self, params: SamplingParams) -> Completion:
        """Sample from this branch until it stops; the sampled ids become part of it."""
        engine = self._idle_engine("generate")
        request = engine.start(self, params)
        try:
            engine.run()
        except BaseException:
            engine.cancel(request)
            raise
        return request.completion

    def fork(self, n: int = 1) -> list[Branch]:
        """`n` branches with the same ids; full pages are shared, the partly filled one is copied."""
        engine = self._idle_engine("fork")
        children = [engine.open(self.token_ids, self.adapter) for _ in range(n)]
        for child in children:
            partial = engine.pool.fork(self, child)
            if partial is not None:
                engine._runner.copy_page(*partial)
        return children

    def rewind(self, n_tokens: int) -> None:
        """Drop the last `n_tokens` ids."""
        engine = self._idle_engine("rewind")
        if not 0 <= n_tokens <= len(self):
            accepted = f"0 to {len(self)}, the branch's length"
            raise ValueError(f"rewind: n_tokens = {n_tokens}, accepted is {accepted}")
        del self.token_ids[len(self) - n_tokens :]
        engine.pool.trim(self, len(self))

    def close(self) -> None:
        """Give the pages back. Closing twice is allowed; any other use afterwards raises."""
        if self.engine is not None:
            engine = self._idle_engine("close")
            engine.pool.release(self)
            del engine._branches[self]
            self.engine = None

    def _idle_engine(self, verb: str) -> Engine:
        if self.engine is None:
            raise RuntimeError(f"Branch.{verb}: this branch is closed")
        if self.request is not None:
            raise RuntimeError(f"Branch.{verb}: this branch is generating; wait for its request to finish")
        return self.engine


class Engine:
    """Generates on `model`'s own parameters: nothing is copied; the next request sees an update in place.

    page_size: tokens of a KV page (a multiple of 16 for the CPU kernels).
    cache_tokens: size of the pool; None takes 85 % of the memory free on CUDA, and CACHE_TOKENS on CPU.
    max_batch: requests that run at once.
    max_step_tokens: tokens of one step, prefill and decode together.
    decode: ids to text, for stop strings (a tokenizer's).
    decode_steps: tokens per row and host sync while nothing but decoding is to be done (None: 8; on CUDA such
    a step is a graph, on CPU they are one call). The draws do not depend on it.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        page_size: int = 16,
        cache_tokens: int | None = CACHE_TOKENS,
        max_batch: int = 256,
        max_step_tokens: int = 1_024,
        seed: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        decode_steps: int | None = None,
    ) -> None:
        sizes = {"max_batch": max_batch, "max_step_tokens": max_step_tokens, "decode_steps": decode_steps}
        check_sizes(page_size, cache_tokens, sizes)
        if cache_tokens is None:
            cache_tokens = measured_tokens(model, page_size)
        self.model = model
        self.adapters: list[Adapter | None] = [model.adapter if isinstance(model, LoraDecoder) else None]
        self._parameters = list(model.parameters())  # walking the modules costs as much as a layer
        self._weights_seen = self._weights_counter()
        self._seed = seed
        self._n_unseeded = 0
        self._decode = decode
        self._branches: dict[BranchState, None] = {}  # open branches, the longest unused first
        n_pages = cache_tokens // page_size
        self._runner = Runner(model, self.adapters, n_pages, page_size, decode_steps, max_batch)
        self.pool = PagePool(n_pages, page_size)
        self._scheduler = Scheduler(self.pool, max_batch, max_step_tokens, self._branches)
        self.stats: Stats = self._scheduler.stats

    # ---- whole completions -------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], n: int = 1
    ) -> list[Completion]:
        """`n` completions per prompt, in order; `params` is shared, or one per prompt.

        With a seed s in it, the completions of a prompt have s, s + 1 and so on.
        """
        of_prompt = params if isinstance(params, list) else [params] * len(prompts)
        if len(of_prompt) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(of_prompt)} SamplingParams")
        if n < 1:
            raise ValueError(f"generate: n = {n}, accepted is an integer >= 1")
        branches: list[Branch] = []
        requests: list[Request] = []
        try:
            for prompt in prompts:
                branches += [self.open(prompt) for _ in range(n)]
            for i, branch in enumerate(branches):
                p = of_prompt[i // n]
                if n > 1 and p.seed is not None:
                    p = replace(p, seed=(p.seed + i % n) % 2**63)
                requests.append(self.start(branch, p))
            self.run()
        finally:
            for branch in branches:
                if branch.request is not None:
                    self.cancel(branch.request)  # something went wrong; what others asked for goes on
                branch.close()
        return [request.completion for request in requests]

    # ---- branches and requests ---------------------------------------------------------------------------

    def open(self, token_ids: Ids[int] = (), adapter: int = 0) -> Branch:
        """A live sequence that begins with `token_ids` and goes through `adapters[adapter]`."""
        token_ids = plain_ids(token_ids)
        check_ids(token_ids, self.model.config.vocab_size)
        if not 0 <= adapter < len(self.adapters):
            raise ValueError(f"open: adapter = {adapter}, accepted is 0 to {len(self.adapters) - 1}")
        branch = Branch(self, token_ids, adapter)
        self._branches[branch] = None
        return branch

    def prefill(self, branches: list[Branch]) -> None:
        """Compute the KV of whole contexts now, so that forks share it."""
        self._notice_new_weights()
        branches = [branch for branch in branches if branch.token_ids]
        for branch in branches:
            self._check_request(branch, SamplingParams(max_new_tokens=1))
        requests = [self._queue(branch, SamplingParams(), 0, prefill_only=True) for branch in branches]
        try:
            self.run()
        except BaseException:
            for request in requests:
                self.cancel(request)
            raise

    def start(self, branch: Branch, params: SamplingParams) -> Request:
        """Put a request for `branch` in line. `step` or `run` works on it."""
        self._check_request(branch, params)
        self._notice_new_weights()
        seed = params.seed
        if seed is None:  # a multiplicative hash keeps the engine's own seeds apart from small user seeds
            seed = ((self._seed << 32) + self._n_unseeded) * 0x9E3779B97F4A7C15 % 2**63
            self._n_unseeded += 1
        self.pool.trim(branch, len(branch) - 1)  # the last token is computed again, to sample after it
        return self._queue(branch, params, seed, prefill_only=False)

    @property
    def _limits(self) -> dict[str, int]:
        return {
            "the model's max_position_embeddings": self.model.config.max_position_embeddings,
            "the KV pool (rollout.cache_tokens)": self.pool.n_pages * self.pool.page_size,
        }

    @property
    def most_tokens(self) -> int:
        """That a context can have, with what is sampled after it."""
        return min(self._limits.values())

    def _check_request(self, branch: Branch, params: SamplingParams) -> None:
        if branch.engine is not self:
            raise RuntimeError("this branch is closed or belongs to another engine")
        if branch.request is not None:
            raise RuntimeError("this branch is generating already; wait for its request to finish")
        check_fits(len(branch), params, self._limits)
        check_stop_strings(params.stop_strings, self._decode)
        check_ids([*params.stop_token_ids, *params.candidates], self.model.config.vocab_size)

    def _queue(self, branch: Branch, params: SamplingParams, seed: int, prefill_only: bool) -> Request:
        request = Request(
            branch=branch,
            params=params,
            seed=seed,
            completion=Completion(weights_version=self.weights_version),
            stop_token_ids=frozenset(params.stop_token_ids),
            prefill_only=prefill_only,
        )
        if request.n_todo:
            branch.request = request
            self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request that is not needed any more; what it sampled stays."""
        if not request.done:
            self._detach(request)
            request.finish("cancelled")

    def abort(self) -> None:
        """Drop every request in flight; what they sampled so far stays in their branches."""
        for request in [*self._scheduler.running, *self._scheduler.waiting]:
            self.cancel(request)

    def _detach(self, request: Request) -> None:
        self._scheduler.drop(request)
        branch = request.branch
        branch.request = None
        self.pool.trim(branch, branch.n_cached)  # of pages that were reserved and not reached
        self._branches[branch] = self._branches.pop(branch)  # now the most recently used

    # ---- one step ----------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is in flight."""
        return self._scheduler.busy

    def run(self) -> None:
        """Step until nothing is in flight."""
        while self.busy:
            self.step()

    def step(self) -> list[Request]:
        """One step of the model over everything in flight, or several where all that is left is decoding.

        Returns the requests that it finished. RuntimeError when the weights changed since they were started.
        """
        self._notice_new_weights()
        works = self._scheduler.plan()
        if not works:
            return []
        assert self.pool.all_present([w.request.branch for w in works]), "KV of other weights"
        loop = self._runner.loop
        launched = [self._launch(part) for part in ([works] if loop is None else loop.parts(works))]
        return [request for part, read, ahead in launched for request in self._take_all(part, read(), ahead)]

    def _launch(self, works: list[Work]) -> tuple[list[Work], Read, bool]:
        """Put works on their way: how to read what comes of them, and whether in several steps."""
        steps = self._steps_ahead(works)
        if steps is None:
            return works, self._runner.execute(works, self._allowed(works)), False
        return works, self._runner.decode(works, steps), True

    def _steps_ahead(self, works: list[Work]) -> int | None:
        """Steps without a host sync in between; reserves the pages of all. None when a plain step must do."""
        loop = self._runner.loop
        if loop is None or [w for w in works if w.n_tokens != 1 or not w.samples]:
            return None
        requests = [w.request for w in works]
        if not loop.takes(requests):
            return None
        left = [r.n_left - r.ahead for r in requests]
        steps = loop.reach(left)
        if steps <= 1 and not any(r.ahead for r in requests):
            return None
        wanted = [(r.branch, r.ahead + min(steps, n)) for r, n in zip(requests, left, strict=True)]
        return steps if self._scheduler.reserve(wanted) else None

    def _take_all(self, works: list[Work], decoded: DecodedSteps, ahead: bool) -> list[Request]:
        """Enter what was computed and drawn; the requests that are finished."""
        finished: list[Request] = []
        taken = 0
        draws = iter(decoded.rows())
        pool = self.pool
        for work in works:
            request, branch = work.request, work.request.branch
            if work.samples:
                taken += enter_draws(work, next(draws), pool, self._decode)
            else:
                taken += enter_prefill(work, pool)
            if request.done:
                finished.append(request)
                self._detach(request)
            elif ahead and not request.ahead and len(branch.pages) > pool.pages_for(branch.n_cached):
                pool.trim(branch, branch.n_cached)
        self._scheduler.count_ahead(len(works), len(decoded), taken)
        self.stats.waited_seconds += decoded.seconds
        return finished

    def _allowed(self, works: list[Work]) -> dict[int, Ids[int]]:
        """The allowed ids of the sampling rows that are restricted."""
        requests = [w.request for w in works if w.samples]
        answers = {row: allowed_ids(r, self.model.config.vocab_size) for row, r in enumerate(requests)}
        return {row: ids for row, ids in answers.items() if ids is not None}

    # ---- weights and memory ------------------------------------------------------------------------------

    @property
    def weights_version(self) -> int:
        """Of the present weights; completions are marked with it."""
        return self.pool.weights_version

    def use_adapters(self, others: Ids[Adapter | None]) -> None:
        """Let branches be opened with these adapters of the same base too, as `adapter` 1, 2 and so on.

        None is the base itself. They share the pool and run in the same steps. All KV is dropped.
        """
        assert not self.busy
        assert isinstance(self.model, LoraDecoder) or not others, "adapters need a model with one"
        self.adapters[1:] = others
        self._runner.forget_graphs()
        parameters = dict.fromkeys(self.model.parameters())
        for adapter in others:
            if adapter is not None:
                parameters |= dict.fromkeys(adapter.parameters())
        self._parameters = list(parameters)
        self.name_weights(self.weights_version)

    def name_weights(self, version: int) -> None:
        """Call the present weights `version` from now on, e.g. by the number of updates; all KV is dropped.

        Without this the engine counts the changes that it notices by itself.
        """
        assert not self.busy
        self._weights_seen = self._weights_counter()
        self.pool.weights_version = version
        for branch in self._branches:
            self.pool.release(branch)

    def release_memory(self) -> None:
        """Give the pool's memory back until the next request. All KV is dropped, no branch is."""
        assert not self.busy
        for branch in self._branches:
            self.pool.release(branch)
        self._runner.release_memory()

    def _weights_counter(self) -> int:
        return writes(self._parameters)

    def _notice_new_weights(self) -> None:
        """A new weights version when any parameter was written since; KV of the old one is dropped."""
        if self._weights_counter() == self._weights_seen:
            return
        if self.busy:
            raise RuntimeError(
                "the weights changed while requests were in flight; finish or abort them before an update"
            )
        self.name_weights(self.weights_version + 1)
