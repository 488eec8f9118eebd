"""The KV pool: fixed-size pages, reference counts, and the weights version under which each page was written.

A full page has a key: the page before it, its own ids and the weights version. Branches whose ids and adapter agree find each
other's pages by it. A page before another lives as long as that one, because whoever holds a page holds those before it too; so keys
of live pages never point to reused ones. The pool holds numbers only; the tensors that the numbers index belong to the runner.
"""

from __future__ import annotations

Key = tuple[int, int, tuple[int, ...]]  # version, page before (-1 - adapter at the start), token ids


class PagePool:
    """`n_pages` pages of `page_size` tokens. A page is free, or held by one or more branches."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self.refcount = [0] * n_pages
        self.version = [0] * n_pages
        self._by_key: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._free = list(range(n_pages - 1, -1, -1))  # a stack: the most recently freed page is the warmest

    @property
    def n_free(self) -> int:
        return len(self._free)

    def pages_for(self, n_tokens: int) -> int:
        """Pages that `n_tokens` tokens take."""
        return -(-n_tokens // self.page_size)

    def take(self, n: int, version: int) -> list[int] | None:
        """`n` pages of one reference each, or None (and no change) when fewer are free."""
        if n > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self.refcount[page] = 1
            self.version[page] = version
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

    def find(self, key: Key) -> int | None:
        """The live page that holds these ids after that page, if there is one."""
        return self._by_key.get(key)

    def name(self, page: int, key: Key) -> int:
        """Let others find a page that is full now. Returns the page to use: an equal one may have been named before."""
        assert key[0] == self.version[page]
        if page not in self._keys:
            found = self._by_key.setdefault(key, page)
            if found != page:
                self.share([found])
                self.give_back([page])
                return found
            self._keys[page] = key
        return page

    def unname(self, page: int) -> None:
        """The page is not to be found any more: it is free, or its tail will be written anew."""
        if (key := self._keys.pop(page, None)) is not None:
            del self._by_key[key]
