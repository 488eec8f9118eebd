"""llama.cpp beside our engine, through the low-level functions of llama-cpp-python.

One GGUF file serves as it is, and in 16 bits as llama.cpp itself writes its weights (`written_as`).
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

PRECISIONS = {"f16": "LLAMA_FTYPE_MOSTLY_F16", "bf16": "LLAMA_FTYPE_MOSTLY_BF16"}


def library() -> Any:
    """llama_cpp.llama_cpp, silent. RuntimeError says what is missing."""
    try:
        import llama_cpp.llama_cpp as api
    except (ImportError, RuntimeError, OSError) as error:
        raise RuntimeError(f"--peer llamacpp needs llama-cpp-python: {error}") from None
    library.silent = api.llama_log_callback(lambda level, text, data: None)  # type: ignore[attr-defined]
    api.llama_log_set(library.silent, ctypes.c_void_p())  # type: ignore[attr-defined]
    api.llama_backend_init()
    return api


def written_as(gguf: Path, precision: str, folder: Path) -> Path:
    """The same weights at one of `PRECISIONS`."""
    api = library()
    out = folder / f"{gguf.stem}.{precision}.gguf"
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, PRECISIONS[precision])
    params.allow_requantize = True
    params.nthread = 1
    if api.llama_model_quantize(str(gguf).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not write {gguf} as {precision}")
    return out


class LlamaCpp:
    """A model of llama.cpp with room for `sequences` of `length` tokens; every sequence has its own cache."""

    def __init__(self, gguf: Path, sequences: int, length: int, threads: int) -> None:
        self.api = api = library()
        loading = api.llama_model_default_params()
        loading.use_extra_bufts = False
        self.model = api.llama_model_load_from_file(str(gguf).encode(), loading)
        params = api.llama_context_default_params()
        params.n_ctx = sequences * length
        params.n_batch = params.n_ubatch = 2048
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context of {sequences} x {length} tokens for {gguf}")
        self.sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(self.sampler, api.llama_sampler_init_dist(0))
        self.batch = api.llama_batch_init(2048, 0, 1)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_sampler_free(self.sampler)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(id, position, sequence, whether its logits are wanted), at most 2,048 of them."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i], self.batch.pos[i] = token, position
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
            self.batch.logits[i] = wanted
        status = self.api.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(tokens)} tokens")

    def prefill(self, prompts: list[list[int]]) -> list[tuple[int, int]]:
        """Fill the empty cache; per sequence the token that is drawn behind its prompt. Whole prompts go in
        batches of up to 2,048 tokens.
        """
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        drawn: list[tuple[int, int]] = []
        width = max(1, 2048 // max(map(len, prompts)))
        for start in range(0, len(prompts), width):
            rows: list[tuple[int, int, int, bool]] = []
            last = []
            for sequence, ids in enumerate(prompts[start : start + width], start):
                rows += [(token, i, sequence, i + 1 == len(ids)) for i, token in enumerate(ids)]
                last.append((len(rows) - 1, len(ids)))
            self.decode(rows)
            drawn += [(self.draw(i), length) for i, length in last]
        return drawn

    def draw(self, row: int) -> int:
        return int(self.api.llama_sampler_sample(self.sampler, self.context, row))

    def generate(self, prompts: list[list[int]], new: int) -> int:
        """Sample `new` tokens behind each prompt; returns how many in all."""
        ahead = self.prefill(prompts)
        for _ in range(new - 1):
            self.decode([(token, position, s, True) for s, (token, position) in enumerate(ahead)])
            ahead = [(self.draw(s), position + 1) for s, (_, position) in enumerate(ahead)]
        return new * len(prompts)


@contextlib.contextmanager
def peers(
    gguf: Path, prompts: torch.Tensor, new: int, threads: int
) -> Iterator[dict[str, Callable[[], int]]]:
    """Per precision a call that does the work of the bench and returns its tokens; `new` of 0 computes the
    prompts alone.
    """
    ids = prompts.tolist()
    length = prompts.shape[1] + new + 8

    def call(file: Path) -> Callable[[], int]:
        model = LlamaCpp(file, len(ids), length, threads)
        stack.callback(model.close)
        return lambda: model.generate(ids, new) if new else len(model.prefill(ids)) * prompts.shape[1]

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = {name: written_as(gguf, name, Path(folder)) for name in PRECISIONS}
        files[gguf.stem.rpartition(".")[2].lower()] = gguf
        yield {f"llamacpp_{name}": call(file) for name, file in files.items()}
