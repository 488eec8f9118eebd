"""How a dialogue goes, read from top to bottom: a protocol is a generator that yields what it waits for and
is sent the answers.

    one, other = yield [talk.turn(0), talk.turn(1)]   # both at once: their words, None where nobody answered
    (answer,) = yield [talk.question(AGREEMENT)]       # the judge's answer, None where there is none

What it returns is the outcome, None for a dialogue that is unscored. Many dialogues go on beside each
other: while one waits, others speak. A new protocol is a function here, entered below under its name, which
its games name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from duologue.rollout.games.dilemma import NO_AGREEMENT, DilemmaGame
from duologue.rollout.games.game import UNSCORED, Outcome
from duologue.rollout.games.selection import SelectionGame
from duologue.rollout.games.text_game import FULL, UNFINISHED, TextGame
from duologue.rollout.judge.questions import AGREEMENT, SCORE
from duologue.rollout.selfplay.dialogue import FINAL, POLICY
from duologue.rollout.selfplay.question import Question
from duologue.rollout.selfplay.speakers import Speak
from duologue.rollout.selfplay.talk import Talk

Requests = Sequence[Speak | Question]
Protocol = Generator[Requests, Any, Outcome | None]


def negotiation(talk: Talk) -> Protocol:
    """Speak in turn until somebody closes; then both state their selection and the rules score it."""
    game: SelectionGame = talk.game
    role = talk.first
    for _ in range(2 * talk.rules.max_rounds):
        (said,) = yield [talk.turn(role, draw=role)]
        if said is None:
            return None
        if game.closes(said):
            break
        role = 1 - role
    else:
        return game.judge(talk.scenario, None)
    closer, other = yield [talk.turn(side, FINAL, draw=side) for side in (role, 1 - role)]
    if closer is None or other is None:
        return None
    return game.judge(talk.scenario, (closer, other) if role == 0 else (other, closer))


def deliberation(talk: Talk) -> Protocol:
    """Rounds of one turn each until a judge sees an agreement; then a resolution, which the judge scores.

    Side 0 writes the resolution, or side 1 where an opponent has side 0: the policy does, always.
    """
    game: DilemmaGame = talk.game
    agreed, rounds = game.alone, 0
    while not agreed and rounds < talk.rules.max_rounds and not talk.left():
        if not (yield from _judged_so_far(talk)):
            return game.outcome(rounds, failure=UNSCORED)
        for _ in range(2):
            (said,) = yield [talk.turn((talk.first + len(talk.turns)) % 2)]
            if said is None:
                return game.outcome(rounds, failure=UNSCORED)
            if talk.left():
                break
        rounds += 1
        (answer,) = yield [talk.question(AGREEMENT)]
        if answer is None:
            return game.outcome(rounds, failure=UNSCORED)
        agreed = answer["agreed"]
    if agreed or talk.rules.always_final:
        if not (yield from _judged_so_far(talk)):
            return game.outcome(rounds, failure=UNSCORED)
        yield [talk.turn(talk.players.index(POLICY), FINAL, draw="final")]
    if not agreed:
        return game.outcome(rounds, failure=NO_AGREEMENT)
    (answer,) = yield [talk.question(SCORE)]
    return game.outcome(rounds, agreed, None if answer else UNSCORED, answer)


def _judged_so_far(talk: Talk) -> Generator[Requests, Any, bool]:
    """Have the judge score the talk as it stands, where that is asked for; False where nobody answered."""
    if talk.rules.step_scores and talk.turns:
        (answer,) = yield [talk.question(SCORE, unfinished=True)]
        if answer is None:
            return False
        talk.standing = talk.game.outcome(0, answer=answer).scores
    return True


def text_game(talk: Talk) -> Protocol:
    """Whoever the game asks hears what is new to it and moves, in any order, until the game is over."""
    game: TextGame = talk.game
    match = game.begin(talk.scenario.data)
    talk.first = match.side
    while not match.done:
        if match.moves == 2 * talk.rules.max_rounds or talk.left():
            return game.outcome(match, UNFINISHED)
        if not talk.tell(match.side, match.text):
            return game.outcome(match, FULL)
        if talk.rules.step_scores:
            talk.standing = match.scores_so_far()
        (said,) = yield [talk.turn(match.side, legal=match.legal)]
        if said is None:
            return None
        if not talk.left():
            match.step(said)
    return game.outcome(match)


PROTOCOLS: dict[str, Callable[[Talk], Protocol]] = {
    "negotiation": negotiation,
    "deliberation": deliberation,
    "text_game": text_game,
}
