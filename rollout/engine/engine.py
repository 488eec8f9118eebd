"""The rollout engine: many live sequences on one set of weights, with paged KV and continuous batching.

    engine = Engine(model)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=64, stop_token_ids=(2,)))

    branch = engine.open(prompt)                    # or keep a dialogue's KV between turns
    reply = branch.generate(params)
    branch.append(other_side)
    reply = branch.generate(params)

On CPU the log-probs equal those of `duologue.model.decoder.score` bit for bit, whatever the batch, fork, preemption or turn.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import replace
from itertools import chain
from operator import attrgetter

from duologue.model.decoder import Decoder
from duologue.model.lora import Adapter, LoraDecoder
from duologue.rollout.engine.pages import PagePool
from duologue.rollout.engine.runner import Runner, measured_tokens
from duologue.rollout.engine.scheduler import Scheduler, Stats, Work
from duologue.rollout.engine.sequence import Branch, Completion, Request, SamplingParams

_VERSION = attrgetter("_version")  # torch counts the writes into a tensor


class Engine:
    """Generates on `model`'s own parameters: nothing is copied, and an optimizer step in place is seen by the next request.

    page_size: tokens of a KV page (a multiple of 16 for the CPU kernels). cache_tokens: size of the pool; None takes 85 % of the
    memory that is free now on CUDA, and 65,536 on CPU.
    max_batch: requests that run at once. max_step_tokens: tokens of one step, prefill and decode together.
    decode: ids to text, for stop strings (a tokenizer's). decode_steps: tokens per row between two looks of the host while nothing but
    decoding is to be done (None: 8; on CUDA such a step is a graph, on CPU they are one call); the draws do not depend on it.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        page_size: int = 16,
        cache_tokens: int | None = 65_536,
        max_batch: int = 256,
        max_step_tokens: int = 1_024,
        seed: int = 0,
        decode: Callable[[list[int]], str] | None = None,
        decode_steps: int | None = None,
    ) -> None:
        if page_size < 16 or page_size % 16:
            raise ValueError(
                f"page_size = {page_size}: accepted is a multiple of 16 (attention works on chunks of 16 keys)"
            )
        cache_tokens = measured_tokens(model, page_size) if cache_tokens is None else cache_tokens
        if cache_tokens < page_size:
            raise ValueError(f"cache_tokens = {cache_tokens}: accepted is at least one page ({page_size})")
        for name, value in (
            ("max_batch", max_batch),
            ("max_step_tokens", max_step_tokens),
            ("decode_steps", decode_steps),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: accepted is an integer >= 1")
        self.model = model
        self.weights_version = 0
        self._parameters = list(model.parameters())  # walking the modules costs as much as a layer
        self.adapters: list[Adapter | None] = [model.adapter if isinstance(model, LoraDecoder) else None]
        self._weights_seen = self._weights_counter()
        self._seed = seed
        self._decode = decode
        self._n_requests = 0
        self._branches: dict[Branch, None] = {}  # open branches, the longest unused first
        self._runner = Runner(model, cache_tokens // page_size, page_size, decode_steps)
        self.pool = PagePool(cache_tokens // page_size, page_size)
        self._scheduler = Scheduler(self.pool, max_batch, max_step_tokens, self._branches)

    @property
    def stats(self) -> Stats:
        return self._scheduler.stats

    # ---- whole completions -------------------------------------------------------------------------------------------

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], n: int = 1
    ) -> list[Completion]:
        """`n` completions per prompt, in order. `params` is shared, or one per prompt (a seed in it is then the first one's)."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(each)} SamplingParams")
        if n < 1:
            raise ValueError(f"generate: n = {n}, accepted is an integer >= 1")
        if n > 1:
            prompts = [prompt for prompt in prompts for _ in range(n)]
            each = [
                p if p.seed is None else replace(p, seed=(p.seed + i) % 2**63) for p in each for i in range(n)
            ]
        branches: list[Branch] = []
        try:
            branches = [self.open(prompt) for prompt in prompts]
            requests = [self.start(branch, p) for branch, p in zip(branches, each, strict=True)]
            self.run()
        except BaseException:
            self.abort()
            raise
        finally:
            for branch in branches:
                branch.close()
        return [request.completion for request in requests]

    # ---- branches ----------------------------------------------------------------------------------------------------

    def use_adapters(self, others: Ids[Adapter | None]) -> None:
        """Let branches be opened with these adapters of the same base too: `adapter` 1, 2 and so on, 0 stays the model's own.

        None is the base itself. They share the pool and run in the same steps. All KV is dropped.
        """
        assert not self.busy
        assert isinstance(self.model, LoraDecoder) or not others, "adapters need a model with one"
        self.adapters[1:] = others
        self._runner.forget_graphs()
        own = set(map(id, parameters := list(self.model.parameters())))
        more = (p for adapter in others if adapter is not None for p in adapter.parameters())
        self._parameters = [*parameters, *(p for p in more if id(p) not in own)]
        self.name_weights(self.weights_version)

    def open(self, token_ids: Ids[int] = (), adapter: int = 0) -> Branch:
        """A live sequence that begins with `token_ids` and goes through `adapters[adapter]`."""
        self.check_ids(token_ids)
        if not 0 <= adapter < len(self.adapters):
            raise ValueError(f"open: adapter = {adapter}, accepted is 0 to {len(self.adapters) - 1}")
        branch = Branch(self, token_ids, adapter)
        self._branches[branch] = None
        return branch

    def start(self, branch: Branch, params: SamplingParams) -> Request:
        """Put a request for `branch` in line. `step` or `run` works on it."""
        self._check_request(branch, params)
        self._notice_new_weights()
        seed = params.seed
        if seed is None:  # a multiplicative hash keeps the engine's own seeds apart from small user seeds
            seed = ((self._seed << 32) + self._n_requests) * 0x9E3779B97F4A7C15 % 2**63
        self._n_requests += 1
        return self._queue(branch, params, seed, prefill_only=False)

    def prefill(self, branches: list[Branch]) -> None:
        """Compute the KV of whole contexts now, so that forks share it."""
        self._notice_new_weights()
        for branch in branches:
            if branch.token_ids:
                self._check_request(branch, SamplingParams(max_new_tokens=1))
                self._queue(branch, SamplingParams(), 0, prefill_only=True)
        self.run()

    def fork(self, branch: Branch, n: int) -> list[Branch]:
        """See `Branch.fork`. When no page is left for the copy, the child recomputes those tokens instead."""
        size = self.pool.page_size
        n_full, rest = divmod(branch.n_cached, size)
        children = []
        for _ in range(n):
            child = self.open(branch.token_ids, branch.adapter)
            child.pages = branch.pages[:n_full]
            child.n_cached = n_full * size
            self.pool.share(child.pages)
            if rest and (page := self.pool.take(1, self.pool.version[branch.pages[n_full]])):
                self._runner.copy_page(branch.pages[n_full], page[0])
                child.pages += page
                child.n_cached += rest
            children.append(child)
        return children

    def rewind(self, branch: Branch, n_tokens: int) -> None:
        if not 0 <= n_tokens <= len(branch.token_ids):
            raise ValueError(
                f"rewind: n_tokens = {n_tokens}, accepted is 0 to {len(branch.token_ids)}, the branch's length"
            )
        del branch.token_ids[len(branch.token_ids) - n_tokens :]
        self._trim(branch, len(branch.token_ids))

    def close(self, branch: Branch) -> None:
        self._scheduler.release(branch)
        del self._branches[branch]

    # ---- the loop ----------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a request is in flight."""
        return self._scheduler.busy

    def run(self) -> None:
        """Step until nothing is in flight."""
        while self.busy:
            self.step()

    def step(self) -> list[Request]:
        """One step of the model over everything in flight; returns the requests that it finished."""
        if self._weights_counter() != self._weights_seen:
            raise RuntimeError(
                "the weights changed while requests were in flight; finish or abort them before an update"
            )
        works = self._scheduler.plan(self.weights_version)
        if not works:
            return []
        pages = chain.from_iterable(w.request.branch.pages for w in works)
        assert set(map(self.pool.version.__getitem__, pages)) == {self.weights_version}, "KV of other weights"
        if steps := self._steps_ahead(works):
            return self._decode_ahead(works, steps)
        sampled = zip(*self._runner.execute(works, self._allowed(works), self.adapters), strict=True)
        finished = []
        for work in works:
            request = work.request
            self._scheduler.computed(request.branch, work.n_tokens, self.weights_version)
            request.plain = False
            if work.samples:
                self._take(request, *next(sampled))
            elif request.prefill_only and request.n_todo == 0:
                request.done = True
            if request.done:
                finished.append(request)
                self._scheduler.running.remove(request)
                self._detach(request)
        return finished

    def _steps_ahead(self, works: list[Work]) -> int:
        """Steps that can be taken without a look in between, with pages reserved for all of them; 0 when a plain step must do."""
        loop, requests = self._runner.loop, [w.request for w in works]
        if (
            loop is None
            or len(used := {r.branch.adapter for r in requests}) > 1
            or not loop.takes(requests, self.adapters[used.pop()])
        ):
            return 0
        if not all(w.samples and w.n_tokens == 1 for w in works):
            return 0
        left = [r.params.max_new_tokens - len(r.completion.token_ids) for r in requests]
        steps = loop.reach(left)
        room = all(
            self._scheduler.grow(r.branch, min(steps, n), self.weights_version)
            for r, n in zip(requests, left, strict=True)
        )
        return steps if steps > 1 and room else 0

    def _decode_ahead(self, works: list[Work], steps: int) -> list[Request]:
        drawn, taken = self._runner.decode(works, steps, self.adapters), 0
        steps = len(drawn.tokens)
        self.stats.waited_seconds += drawn.waited
        finished = []
        for row, request in enumerate(w.request for w in works):
            for step in range(steps):
                if drawn.overflows(
                    step, row
                ):  # a plain step draws this token again, the same one, with room for its support
                    request.plain = True
                    break
                self._scheduler.computed(request.branch, 1, self.weights_version)
                taken += 1
                token, logprob, entropy = (
                    x[step, row].item() for x in (drawn.tokens, drawn.logprobs, drawn.entropies)
                )
                self._take(request, token, logprob, entropy, drawn.support(step, row))
                if request.done:
                    finished.append(request)
                    self._scheduler.running.remove(request)
                    self._detach(request)
                    break
            self._trim(request.branch, request.branch.n_cached)
        self._scheduler.count_ahead(len(works), steps, taken)
        return finished

    def cancel(self, request: Request) -> None:
        """End a request that is not needed any more, for example when its group is decided; what it sampled stays."""
        if not request.done:
            self._scheduler.drop(request)
            self._detach(request)
            request.completion.finish_reason, request.done = "cancelled", True

    def abort(self) -> None:
        """Drop every request in flight; what they sampled so far stays in their branches."""
        for request in [*self._scheduler.running, *self._scheduler.waiting]:
            self._detach(request)
        self._scheduler.running.clear()
        self._scheduler.waiting.clear()

    # ---- checks and bookkeeping --------------------------------------------------------------------------------------

    def check_ids(self, token_ids: Ids[int]) -> None:
        """Raise ValueError unless every id is in the vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.model.config.vocab_size):
            bad = next(t for t in token_ids if not 0 <= t < self.model.config.vocab_size)
            raise ValueError(
                f"token id {bad} is outside the vocabulary: accepted is 0 to {self.model.config.vocab_size - 1}"
            )

    def _check_request(self, branch: Branch, params: SamplingParams) -> None:
        if branch.engine is not self:
            raise RuntimeError("this branch is closed or belongs to another engine")
        if branch.request is not None:
            raise RuntimeError("this branch is generating already; wait for its request to finish")
        if not branch.token_ids:
            raise ValueError(
                "an empty branch cannot generate: append at least one token (usually the bos token)"
            )
        n, new = len(branch.token_ids), params.max_new_tokens
        limits = (
            (self.model.config.max_position_embeddings, "the model's max_position_embeddings"),
            (self.pool.n_pages * self.pool.page_size, "the KV pool (rollout.cache_tokens)"),
        )
        for limit, what in limits:
            if n + new > limit:
                raise ValueError(
                    f"a context of {n} tokens and max_new_tokens {new} exceed {what}, which holds {limit}"
                )
        if params.stop_strings and self._decode is None:
            raise ValueError(
                "SamplingParams.stop_strings need an engine with a decode function: Engine(model, decode=...)"
            )
        for token in params.stop_token_ids:
            self.check_ids((token,))

    def _queue(self, branch: Branch, params: SamplingParams, seed: int, prefill_only: bool) -> Request:
        request = Request(
            branch=branch,
            params=params,
            seed=seed,
            completion=Completion(weights_version=self.weights_version),
            stop_token_ids=frozenset(params.stop_token_ids),
            prefill_only=prefill_only,
        )
        if not prefill_only:
            self._trim(
                branch, len(branch.token_ids) - 1
            )  # the last token must be computed again to sample after it
        elif request.n_todo == 0:
            return request
        branch.request = request
        self._scheduler.add(request)
        return request

    def _allowed(self, works: list[Work]) -> dict[int, Ids[int]]:
        """The allowed ids of the sampling rows that are restricted. A callback that fails ends its request, not the step."""
        allowed: dict[int, Ids[int]] = {}
        for row, request in enumerate(w.request for w in works if w.samples):
            if request.params.allow is None:
                continue
            try:
                ids = request.params.allow(list(request.completion.token_ids))
                if ids is not None:
                    self.check_ids(ids)
                    if not len(ids):
                        raise ValueError("no token is allowed")
                    allowed[row] = ids
            except Exception as error:
                request.completion.error = f"SamplingParams.allow: {type(error).__name__}: {error}"
        return allowed

    def _take(self, request: Request, token: int, logprob: float, entropy: float, kept: array[int]) -> None:
        completion, params = request.completion, request.params
        if completion.error:
            completion.finish_reason, request.done = "error", True
            return
        request.branch.token_ids.append(token)
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.entropies.append(entropy)
        completion.kept.add(kept)
        if token in request.stop_token_ids or (
            params.stop_strings and self._says_stop(completion.token_ids, params.stop_strings)
        ):
            completion.finish_reason, request.done = "stop", True
        elif len(completion.token_ids) == params.max_new_tokens:
            completion.finish_reason, request.done = "length", True

    def _says_stop(self, token_ids: list[int], strings: tuple[str, ...]) -> bool:
        """Whether the text ends in one of the strings, give or take the rest of the last token."""
        assert self._decode is not None
        longest = max(map(len, strings))
        text = self._decode(
            token_ids[-(4 * longest + 4) :]
        )  # a character takes four tokens at most, one per byte
        return any(s in text for s in strings)

    def _detach(self, request: Request) -> None:
        request.branch.request = None
        self._branches[request.branch] = self._branches.pop(request.branch)  # now the most recently used

    def _trim(self, branch: Branch, n_cached: int) -> None:
        """Keep the KV of the first `n_cached` tokens at most. A partly kept page that others hold too is let go whole."""
        size = self.pool.page_size
        keep = min(branch.n_cached, n_cached)
        n_pages = self.pool.pages_for(keep)
        if keep % size and self.pool.refcount[branch.pages[n_pages - 1]] > 1:
            n_pages, keep = n_pages - 1, keep // size * size
        self.pool.give_back(branch.pages[n_pages:])
        del branch.pages[n_pages:]
        branch.n_cached = keep
        if keep % size:
            self.pool.unname(branch.pages[-1])

    def release_memory(self) -> None:
        """Give the pool's memory back, for an update; the next request takes it again. All KV is dropped, no branch is."""
        assert not self.busy
        for branch in self._branches:
            self._scheduler.release(branch)
        self._runner.release_memory()

    def _weights_counter(self) -> int:
        return sum(map(_VERSION, self._parameters))

    def _notice_new_weights(self) -> None:
        """A new weights version when any parameter was written since; KV of the old one is dropped and recomputed on use."""
        counter = self._weights_counter()
        if counter == self._weights_seen:
            return
        if self.busy:
            raise RuntimeError(
                "the weights changed while requests were in flight; finish or abort them before an update"
            )
        self.name_weights(self.weights_version + 1)

    def name_weights(self, version: int) -> None:
        """Call the present weights `version` from now on, e.g. by the number of updates; all KV is dropped.

        Without this the engine counts the changes that it notices by itself.
        """
        assert not self.busy
        self._weights_seen = self._weights_counter()
        self.weights_version = version
        for branch in self._branches:
            self._scheduler.release(branch)
