"""A judge behind HTTP: any server with OpenAI's chat completions.

All questions live on one event loop in one background thread, at most `concurrency` of them on the wire. A
question that meets 429 (its Retry-After is kept), 5xx, a timeout or a lost connection is asked again after
a growing pause, one with an invalid answer at once, until `attempts` or `deadline_s` is used up; then it
stays unanswered. Waiting for a place on the wire does not count.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import email.utils
import json
import re
import threading
import time
from typing import Any

import httpx
from duologue.rollout.judge.asking import RETRY_TEMPERATURE, Ask
from duologue.rollout.judge.questions import schema
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

_BACKOFF = wait_exponential_jitter(initial=0.3, max=5, jitter=0.3)


class Fault(Exception):
    """Something that may go better the next time."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Exception):
    """Something that will not: a wrong key, a wrong address."""


class Endpoint:
    """Asks `url`/chat/completions. `api_key` goes into the request's header and nowhere else."""

    section = "judge"  # of the settings

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        concurrency: int = 16,
        deadline_s: float = 240.0,
        timeout_s: float = 60.0,
        attempts: int = 24,
        temperature: float = 0.0,
        max_tokens: int = 512,
        api_key: str = "",
    ) -> None:
        if not re.fullmatch(r"[!-~]*", api_key):
            raise ValueError(f"the {self.section}'s API key has characters other than printable ASCII")
        self.name = model or url
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model or "default"
        self._deadline_s, self._attempts, self._key = deadline_s, attempts, api_key
        self._structured = True  # until the server refuses response_format
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(concurrency)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(min(timeout_s, deadline_s), pool=None),
            limits=httpx.Limits(max_connections=concurrency),
        )
        self._thread = threading.Thread(target=self._loop.run_forever, name=self.section, daemon=True)
        self._thread.start()

    def ask(self, question: Ask) -> None:
        asyncio.run_coroutine_threadsafe(self._answer(question), self._loop)

    def work(self) -> bool:
        return False

    def close(self) -> None:
        """Drop what is in flight and end the thread."""

        if self._loop.is_closed():
            return

        async def shut() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await self._client.aclose()

        with contextlib.suppress(concurrent.futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(shut(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    async def _answer(self, question: Ask) -> None:
        content, reason, last = None, "", ["nothing came back"]
        async with self._places:
            try:
                async with asyncio.timeout(self._deadline_s):
                    content = await self._persist(question, last)
            except TimeoutError:
                reason = f"no valid answer within {self.section}.deadline_s = {self._deadline_s:g}: {last[0]}"
            except (Fault, Refused) as error:
                reason = str(error)
            except Exception as error:  # nobody else would hear of it
                reason = f"{type(error).__name__}: {error}"
        question.done(content, self._hide(reason))

    def _hide(self, text: str) -> str:
        """Without the key, which a server may echo; cut after that, so that no part of it stays."""
        return (text.replace(self._key, "***") if self._key else text)[:300]

    async def _persist(self, question: Ask, last: list[str]) -> str:
        """Ask until there is a valid answer; `last` holds the latest fault for the one who runs out of
        time.
        """
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=_pause,
            retry=retry_if_exception_type(Fault),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                try:
                    content = await self._once(question, attempt.retry_state.attempt_number)
                    question.check(content)
                    return content
                except (Fault, ValueError, httpx.TransportError) as error:
                    last[0] = f"{self._url}: {str(error) or type(error).__name__}"
                    raise Fault(
                        last[0], 0.0 if isinstance(error, ValueError) else getattr(error, "retry_after", None)
                    ) from None
        raise AssertionError("tenacity raises when it gives up")

    async def _once(self, question: Ask, attempt: int) -> str:
        temperature = self.settings["temperature"] if attempt == 1 else RETRY_TEMPERATURE
        messages = [{"role": "user", "content": question.text}]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            **self.settings,
            "temperature": temperature,
        }
        if self._structured:
            form = {"name": question.kind, "strict": True, "schema": schema(question.kind)}
            response_format = {"type": "json_schema", "json_schema": form}
            response = await self._client.post(self._url, json=body | {"response_format": response_format})
            if response.status_code not in (400, 422):
                return self._content(response)
        response = await self._client.post(self._url, json=body)
        if response.is_success:
            self._structured = False  # it was the format that was refused
        return self._content(response)

    def _content(self, response: httpx.Response) -> str:
        """What a chat completion says."""
        if not response.is_success:
            message = f"HTTP {response.status_code}: {self._hide(response.text)}"
            if response.status_code in (408, 409, 429) or response.status_code >= 500:
                raise Fault(message, _seconds(response.headers.get("Retry-After")))
            raise Refused(f"{self._url}: {message}")
        try:
            content = response.json()["choices"][0]["message"]["content"]
            assert isinstance(content, str)
        except (ValueError, LookupError, TypeError, AssertionError):
            raise ValueError(f"not a chat completion: {self._hide(response.text)!r}") from None
        return content


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3)."""
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, float(retry_after or ""))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(retry_after or "").timestamp() - time.time())
    return None


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    wished = error.retry_after if isinstance(error, Fault) else None
    return _BACKOFF(state) if wished is None else wished


class ChatEndpoint(Endpoint):
    """Asks with a whole request body, which the question's text is; any words are an answer."""

    section = "opponent"

    def __init__(self, url: str, model: str = "", **limits: Any) -> None:
        super().__init__(url, model, **limits)
        self.settings = {}  # they are in the body

    async def _once(self, question: Ask, attempt: int) -> str:
        body = {"model": self._model, **json.loads(question.text)}
        return self._content(await self._client.post(self._url, json=body))
