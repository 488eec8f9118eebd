"""The KV pool: fixed-size pages, reference counts, and the weights version under which each page was written.

The pool holds numbers only; the tensors that the numbers index belong to the runner.
"""

from __future__ import annotations


class PagePool:
    """`n_pages` pages of `page_size` tokens. A page is free, or held by one or more branches."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages = n_pages
        self.page_size = page_size
        self.refcount = [0] * n_pages
        self.version = [0] * n_pages
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
