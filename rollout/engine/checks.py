"""What may be asked of the engine: sizes, ids, contexts that fit, callbacks that answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Ids

from duologue.rollout.engine.sequence import Request, SamplingParams


def check_sizes(page_size: int, cache_tokens: int | None, others: Mapping[str, int | None]) -> None:
    """ValueError unless an engine can have these; None is a size that it chooses."""
    if page_size < 16 or page_size % 16:
        raise ValueError(
            f"page_size = {page_size}: accepted is a multiple of 16 (attention works on chunks of 16 keys)"
        )
    if cache_tokens is not None and cache_tokens < page_size:
        raise ValueError(f"cache_tokens = {cache_tokens}: accepted is at least one page ({page_size})")
    for name, value in others.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}: accepted is an integer >= 1")


def plain_ids(token_ids: Iterable[int]) -> list[int]:
    """Of a list, or of an array, a tensor or a set of numbers."""
    return token_ids if isinstance(token_ids, list) else [int(token) for token in token_ids]


def check_ids(token_ids: Ids[int], vocab_size: int) -> None:
    """ValueError unless every id is in the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        bad = next(t for t in token_ids if not 0 <= t < vocab_size)
        raise ValueError(f"token id {bad} is outside the vocabulary: accepted is 0 to {vocab_size - 1}")


def check_fits(n_tokens: int, params: SamplingParams, limits: Mapping[str, int]) -> None:
    """ValueError where a context of `n_tokens` is empty, or exceeds a limit with what may be sampled."""
    if n_tokens == 0:
        raise ValueError("an empty branch cannot generate: append at least one token (usually the bos token)")
    for name, limit in limits.items():
        if n_tokens + params.max_new_tokens > limit:
            raise ValueError(
                f"a context of {n_tokens} tokens and max_new_tokens {params.max_new_tokens} exceed {name}, "
                f"which holds {limit}"
            )


def check_stop_strings(strings: Ids[str], decode: Callable[[list[int]], str] | None) -> None:
    """ValueError where no text can contain one of the strings."""
    if strings and decode is None:
        raise ValueError(
            "SamplingParams.stop_strings need an engine with a decode function: Engine(model, decode=...)"
        )
    for token in getattr(getattr(decode, "__self__", None), "special_texts", ()) if strings else ():
        for string in strings:
            if token in string:
                raise ValueError(
                    f"SamplingParams.stop_strings has {string!r}, but the engine's decode leaves the special "
                    f"token {token!r} out of every text: accepted is its id in stop_token_ids"
                )


def says_stop(token_ids: list[int], strings: Ids[str], decode: Callable[[list[int]], str] | None) -> bool:
    """Whether the text ends in one of the strings, give or take the rest of the last token."""
    if not strings:
        return False
    assert decode is not None
    longest = max(map(len, strings))
    text = decode(token_ids[-(4 * longest + 4) :])  # a character takes four tokens at most
    return any(s in text for s in strings)


def allowed_ids(request: Request, vocab_size: int) -> Ids[int] | None:
    """What `SamplingParams.allow` answers, None for all. When it fails the request has an error."""
    if request.params.allow is None:
        return None
    try:
        answer = request.params.allow(list(request.completion.token_ids))
        if answer is None:
            return None
        ids = plain_ids(answer)
        check_ids(ids, vocab_size)
        if not ids:
            raise ValueError("no token is allowed")
        return ids
    except Exception as error:
        request.completion.error = f"SamplingParams.allow: {type(error).__name__}: {error}"
        return None
