"""The KV pool: fixed-size pages, reference counts, and the weights version under which each page was written.

A full page has a key: the page before it, its own ids and the weights version. Branches whose ids and adapter
agree find each other's pages by it. A page before another lives as long as that one, because whoever holds a
page holds those before it too; so keys of live pages never point to reused ones. The pool holds numbers only;
the tensors that the numbers index belong to the runner.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np
from duologue.rollout.engine.sequence import BranchState

CACHE_TOKENS = 65_536  # of a pool whose size nobody names

Key = tuple[int, int, tuple[int, ...]]  # version, page before (-1 - adapter at the start), token ids


class PagePool:
    """`n_pages` pages of `page_size` tokens. A page is free, or held by one or more branches."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self.refcount = [0] * n_pages
        self.weights_version = 0  # of the weights at present
        self.version = array("q", bytes(8 * n_pages))  # of the weights that each page was written with
        self._by_key: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: the most recently freed page is the warmest

    @property
    def n_free(self) -> int:
        return len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """Pages that `n_tokens` tokens take."""
        return -(-n_tokens // self.page_size)

    def take(self, n: int) -> list[int] | None:
        """`n` pages of one reference each, or None (and no change) when fewer are free."""
        if n > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self.refcount[page] = 1
            self.version[page] = self.weights_version
        return taken

    def share(self, pages: list[int]) -> None:
        """Add a reference to each page."""
        for page in pages:
            assert self.refcount[page] > 0, f"page {page} is free and cannot be shared"
            self.refcount[page] += 1

    def give_back(self, pages: list[int]) -> None:
        """Drop a reference of each page; a page without references is free again."""
        for page in pages:
            assert self.refcount[page] > 0, f"page {page} was given back twice"
            self.refcount[page] -= 1
            if self.refcount[page] == 0:
                self._free.append(page)
                self.unname(page)

    def name(self, page: int, key: Key) -> int:
        """Let others find a page that is full now. Returns the page to use: an equal one may have a name."""
        assert key[0] == self.version[page]
        if page in self._keys:
            return page
        named = self._by_key.setdefault(key, page)
        if named == page:
            self._keys[page] = key
        else:
            self.share([named])
            self.give_back([page])
        return named

    def unname(self, page: int) -> None:
        """The page is not to be found any more: it is free, or its tail will be written anew."""
        if (key := self._keys.pop(page, None)) is not None:
            del self._by_key[key]

    def all_present(self, branches: Sequence[BranchState]) -> bool:
        """Whether all pages of these were written with the present weights."""
        pages = np.fromiter(chain.from_iterable([b.pages for b in branches]), np.int64)
        return bool((np.frombuffer(self.version, np.int64)[pages] == self.weights_version).all())

    # ---- the pages of a branch ---------------------------------------------------------------------------

    def release(self, branch: BranchState) -> None:
        """Give all pages of a branch back; its ids stay."""
        self.give_back(branch.pages)
        branch.pages = []
        branch.n_cached = 0

    def trim(self, branch: BranchState, n_tokens: int) -> None:
        """Keep the KV of the first `n_tokens` at most. A page that others hold too stays whole or goes."""
        keep = min(branch.n_cached, n_tokens)
        n_pages = self.pages_for(keep)
        if keep % self.page_size and self.refcount[branch.pages[n_pages - 1]] > 1:
            n_pages -= 1
            keep = n_pages * self.page_size
        self.give_back(branch.pages[n_pages:])
        del branch.pages[n_pages:]
        branch.n_cached = keep
        if keep % self.page_size:
            self.unname(branch.pages[-1])

    def fork(self, branch: BranchState, child: BranchState) -> tuple[int, int] | None:
        """Let `child`, which has no pages and the same ids, share the full ones.

        Returns the partly filled page and the child's own, into which the caller copies it. None where there
        is none, or no page is left for the copy: then the child recomputes those tokens.
        """
        n_full, rest = divmod(branch.n_cached, self.page_size)
        child.pages = branch.pages[:n_full]
        child.n_cached = n_full * self.page_size
        self.share(child.pages)
        if rest == 0:
            return None
        partial = branch.pages[n_full]
        copy = self.take(1)
        if copy is None:
            return None
        child.pages += copy
        child.n_cached += rest
        return partial, copy[0]

    def key(self, branch: BranchState, index: int) -> Key:
        """Of a branch's page `index`, full or about to be filled."""
        before = branch.pages[index - 1] if index else -1 - branch.adapter
        start = index * self.page_size
        return self.weights_version, before, tuple(branch.token_ids[start : start + self.page_size])

    def next_key(self, branch: BranchState) -> Key | None:
        """Of the page that a branch at a page boundary fills next; None when its ids do not fill one.

        The last token does not count: it must be computed, to sample after it.
        """
        at = branch.n_cached
        if at % self.page_size or len(branch) <= at + self.page_size:
            return None
        return self.key(branch, at // self.page_size)

    def find_shared(self, branch: BranchState) -> int:
        """Take over pages of other branches as far as the ids agree; the number of tokens they hold."""
        n_before = branch.n_cached
        while (key := self.next_key(branch)) is not None:
            page = self._by_key.get(key)
            if page is None:
                break
            self.share([page])
            branch.pages.append(page)
            branch.n_cached += self.page_size
        return branch.n_cached - n_before

    def computed(self, branch: BranchState, n_tokens: int) -> None:
        """`n_tokens` more of a branch's tokens have their KV: name the pages that this filled."""
        first = branch.n_cached // self.page_size
        branch.n_cached += n_tokens
        for i in range(first, branch.n_cached // self.page_size):
            branch.pages[i] = self.name(branch.pages[i], self.key(branch, i))
