"""A judge behind HTTP: any server with OpenAI's chat completions.

All questions live on one event loop in one background thread, at most `concurrency` of them on the wire. A
question that meets 429 (its Retry-After is kept), 5xx, a timeout or a lost connection is asked again after
a growing pause until `deadline_s` is used up, one with an invalid answer at once, INVALID_TRIES times; then
it stays unanswered. Waiting for a place on the wire does not count.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import os
import re
import sys
import threading
from typing import Any

import httpx
from duologue.rollout.judge.asking import RETRY_TEMPERATURE, Ask
from duologue.rollout.judge.ledger import NAMELESS
from duologue.rollout.judge.questions import schema
from duologue.rollout.judge.reply import Fault, Refused, Withheld, complaint, read_reply
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_never,
    wait_exponential_jitter,
)

_BACKOFF = wait_exponential_jitter(initial=0.3, max=5, jitter=0.3)
INVALID_TRIES = 24  # of a question whose answers are none of those that are accepted
WITHHELD_TRIES = 3  # of a question whose answer is cut or withheld
REDIRECTS = 5
OF_HTTPX = re.compile(r"(http|https|all|no)_proxy|ssl_cert_(file|dir)", re.IGNORECASE)  # in the environment
RENAMED = {"max_tokens": "max_completion_tokens"}
LIMITS = (*RENAMED, *RENAMED.values())
OPTIONAL = ("response_format", "seed", "top_p", *LIMITS, "temperature")  # what a request may do without
_UNKNOWN = re.compile(
    r"(un|not |n't |no longer )support|unknown|unrecogni[sz]ed|unexpected|not (permitted|allowed|accepted)"
    r"|deprecated|\buse\b.{0,40}\binstead",
    re.IGNORECASE,
)


class Invalid(Fault):
    """An answer came that is none: what is asked again at once."""


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
        attempts: int | None = None,
        temperature: float = 0.0,
        max_tokens: int = 512,
        api_key: str = "",
        name: str = "",
    ) -> None:
        """`attempts` of any kind end a question too, where they are given.

        `name` is what a server whose model is not named is called in the ledger: one that several runs use
        may hold the answers of several servers, told apart by their addresses.
        """
        if not re.fullmatch(r"[!-~]*", api_key):
            raise ValueError(f"the {self.section}'s API key has characters other than printable ASCII")
        self.name = model or name or NAMELESS
        self.settings: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        self._url = url.rstrip("/") + "/chat/completions"
        self._model = model or NAMELESS
        self._deadline_s, self._attempts, self._key = deadline_s, attempts, api_key
        self._refused: frozenset[str] = frozenset()  # parameters that the server does not take
        self._client = self._new_client(min(timeout_s, deadline_s), concurrency)
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name=self.section, daemon=True)
        self._thread.start()

    def _new_client(self, timeout_s: float, connections: int) -> httpx.AsyncClient:
        try:
            return httpx.AsyncClient(
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=httpx.Timeout(timeout_s, pool=None),
                limits=httpx.Limits(max_connections=connections),
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            there = ", ".join(filter(OF_HTTPX.fullmatch, os.environ))  # a value may hold a password
            raise ValueError(
                f"{self.section}.url: no request can be made with the environment's {there}: {error}"
            ) from None

    def ask(self, question: Ask) -> None:
        asyncio.run_coroutine_threadsafe(self._answer(question), self._loop)

    def work(self) -> bool:
        return False

    def costs(self) -> dict[str, float]:
        return {}  # the work is the server's

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
        hidden = text.replace(self._key, "***") if self._key else text
        return " ".join(hidden[:1000].split())[:300]

    async def _persist(self, question: Ask, last: list[str]) -> str:
        """Ask until there is a valid answer; `last` holds the latest fault for the one who runs out of
        time.
        """
        retrying = AsyncRetrying(
            stop=stop_never if self._attempts is None else stop_after_attempt(self._attempts),
            wait=_pause,
            retry=retry_if_exception_type(Fault),
            reraise=True,
        )
        invalid = withheld = 0
        async for attempt in retrying:
            with attempt:
                try:
                    return await self._valid(question, again=invalid > 0)
                except httpx.UnsupportedProtocol as error:
                    raise Refused(f"{self._url}: {error}") from None
                except (Fault, Withheld, ValueError, httpx.RequestError) as error:
                    if distrust := _distrust(error):
                        raise Refused(f"{self._url}: {distrust}") from None
                    last[0] = f"{self._url}: {str(error) or type(error).__name__}"
                    answered = isinstance(error, (Withheld, ValueError))
                    withheld += isinstance(error, Withheld)
                    invalid += answered
                    if withheld == WITHHELD_TRIES or invalid == INVALID_TRIES:
                        raise Refused(last[0]) from None
                    if answered:
                        raise Invalid(last[0]) from None
                    raise Fault(last[0], getattr(error, "pause", None)) from None
        raise AssertionError("tenacity raises when it gives up")

    async def _valid(self, question: Ask, again: bool) -> str:
        """A checked answer, from one try; `again` after one that was not."""
        body = self._body(question, again)
        response = await self._accepted(body)
        try:
            reply = read_reply(response, self._limit(body))
        except Refused as error:
            raise Refused(f"{self._url}: {error}") from None
        try:
            question.check(reply.text)
        except ValueError:
            if reply.flaw:
                raise Withheld(reply.flaw) from None
            raise
        return reply.text

    def _body(self, question: Ask, again: bool) -> dict[str, Any]:
        """The request for a question."""
        structure = {"name": question.kind, "strict": True, "schema": schema(question.kind)}
        temperature = self.settings["temperature"]
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": question.text}],
            **self.settings,
            "temperature": max(temperature, RETRY_TEMPERATURE) if again else temperature,
            "response_format": {"type": "json_schema", "json_schema": structure},
        }

    def _limit(self, body: dict[str, Any]) -> str:
        return f"judge.max_tokens = {body['max_tokens']}"

    async def _accepted(self, body: dict[str, Any]) -> httpx.Response:
        """The response to `body` without the parameters that the server refuses, as far as it names them;
        what helped is remembered for all later questions.
        """
        refused = self._refused
        while True:
            response = await self._post(adapted(body, refused))
            code, message = complaint(response)
            if code not in (400, 422):
                break
            sent = adapted(body, refused)
            name = refused_parameter(message, sent)
            if name is None and "response_format" in sent and not response.is_success:
                name = "response_format"  # what most servers that name nothing do not know
            if name is None:
                break
            refused = refused | {name}
        if not code:
            self._announce(refused - self._refused)
            self._refused |= refused
        return response

    def _announce(self, refused: frozenset[str]) -> None:
        """Say once what the server is asked without from now on, for it may change the answers."""
        for name in sorted(refused):
            instead = f"sent as {RENAMED[name]}" if name in RENAMED else "left out"
            print(f"{self.section}.url: the server refuses {name!r}: {instead} from now on", file=sys.stderr)

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        """The response, also when it stands elsewhere on the same host; never is the key sent to another."""
        url, lasting = httpx.URL(self._url), True
        for _ in range(REDIRECTS):
            response = await self._client.post(url, json=body)
            place = response.headers.get("Location", "") if response.is_redirect else ""
            if not place:
                if response.is_success and lasting:
                    self._url = str(url)
                return response
            there = url.join(place)
            if not _same_host(url, there):
                raise Refused(f"{self._url}: HTTP {response.status_code}: the server redirects to {there}")
            lasting = lasting and response.status_code in (301, 308)
            url = there
        raise Refused(f"{self._url}: the server redirects more than {REDIRECTS - 1} times, last to {url}")


def _distrust(error: Exception) -> str:
    """Why no secure connection to this server will come about, "" where the next try may have better luck."""
    said = str(error) if isinstance(error, httpx.ConnectError) else ""
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return f"{said}; SSL_CERT_FILE names a file of the certificates to trust"
    return f"{said}: it speaks http, not https" if "WRONG_VERSION_NUMBER" in said else ""


def _same_host(url: httpx.URL, there: httpx.URL) -> bool:
    """Whether the key may go there: the same scheme and port too, or from http to https."""
    if (url.scheme, there.scheme) == ("http", "https"):
        return url.host == there.host
    return (url.scheme, url.host, url.port) == (there.scheme, there.host, there.port)


def adapted(body: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
    """`body` without the parameters `refused`, under their other name where they have one."""
    renamed = {
        RENAMED[name] if name in refused and name in RENAMED else name: value for name, value in body.items()
    }
    return {name: value for name, value in renamed.items() if name not in refused}


def refused_parameter(message: str, body: dict[str, Any]) -> str | None:
    """The parameter of `body` that a complaint is about. A limit on the answer is given up only when it is
    its name that is refused, not its value.
    """
    for name in OPTIONAL:
        named = name in body and re.search(rf"\b{name}\b", message)
        if named and (name not in LIMITS or _UNKNOWN.search(message)):
            return name
    return None


def _pause(state: RetryCallState) -> float:
    """Seconds: what the server wishes, but never less than the pause that grows."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, Invalid):
        return 0.0
    wished = error.pause if isinstance(error, Fault) else None
    return max(wished or 0.0, _BACKOFF(state))


class ChatEndpoint(Endpoint):
    """Asks with a whole request body, which the question's text is; any words are an answer."""

    section = "opponent"

    def __init__(self, url: str, model: str = "", **limits: Any) -> None:
        super().__init__(url, model, **limits)
        self.settings = {}  # they are in the body

    def _body(self, question: Ask, again: bool) -> dict[str, Any]:
        return {"model": self._model, **json.loads(question.text)}

    def _limit(self, body: dict[str, Any]) -> str:
        return f"max_tokens = {body.get('max_tokens')} (dialogue.max_tokens_per_turn or _final)"
