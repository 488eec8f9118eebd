"""A server with OpenAI's chat completions as one side of dialogues.

It hears the talk as text. What it says is tokenised once, here, and stays these ids from then on; they are never trained. Every answer
is kept in a ledger under what was asked, so that a resumed run hears the same.
"""

from __future__ import annotations

import json
import queue
from contextlib import suppress

from duologue.model.tokenizer import Tokenizer
from duologue.rollout.engine.sequence import SamplingParams
from duologue.rollout.judge.endpoint import Endpoint
from duologue.rollout.judge.judge import Ask
from duologue.rollout.judge.ledger import Ledger, ledger_key
from duologue.rollout.selfplay.guests import Message


class ChatEndpoint(Endpoint):
    """Asks with a whole request body, which the question's text is; any words are an answer."""

    section = "opponent"

    async def _once(self, question: Ask, attempt: int) -> str:
        body = {"model": self._model, **json.loads(question.text)}
        return self._content(await self._client.post(self._url, json=body))


class Remote:
    """Sends texts and gives the answers back as ids, under the numbers of what was asked; None is no answer."""

    def __init__(self, endpoint: ChatEndpoint, ledger: Ledger, tokenizer: Tokenizer) -> None:
        self.last_fault = ""
        self._endpoint, self._ledger, self._tokenizer = endpoint, ledger, tokenizer
        self._arrived: queue.SimpleQueue[tuple[int, int, str | None, str]] = queue.SimpleQueue()

    def ask(self, number: int, messages: list[Message], params: SamplingParams) -> None:
        assert params.seed is not None
        limits = {
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        text = json.dumps(
            {"messages": messages, **limits, "seed": params.seed % 2**31}
        )  # some servers take 32 bits
        key = ledger_key(self._endpoint.name, "turn", {}, text)
        if (known := self._ledger.get(key)) is not None:
            self._arrived.put((number, params.max_new_tokens, known, ""))
            return

        def done(content: str | None, reason: str) -> None:  # in the endpoint's thread
            try:
                if content is not None:
                    self._ledger.put(key, "turn", self._endpoint.name, "turn", content)
            except (OSError, ValueError) as error:  # ValueError: not text that can be written
                content, reason = None, str(error)
            self._arrived.put((number, params.max_new_tokens, content, reason))

        self._endpoint.ask(Ask(kind="turn", text=text, check=str, done=done))

    def answered(self, seconds: float) -> list[tuple[int, list[int] | None]]:
        """What has arrived; when nothing has, wait that long."""
        found: list[tuple[int, list[int] | None]] = []
        with suppress(queue.Empty):
            while True:
                wait = seconds > 0 and not found
                number, limit, content, reason = self._arrived.get(wait, seconds if wait else None)
                self.last_fault = reason or self.last_fault
                found.append((number, None if content is None else self._ids(content, limit)))
        return found

    def _ids(self, text: str, limit: int) -> list[int]:
        """As a reply of the policy would be: it ends with the stop token, unless it is cut at the limit of a turn."""
        ids = self._tokenizer.encode(text.strip())
        return [*ids, self._tokenizer.turn_chat.end_token_id] if len(ids) < limit else ids[:limit]

    def close(self) -> None:
        self._endpoint.close()
        self._ledger.close()
