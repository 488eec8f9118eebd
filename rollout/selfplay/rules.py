"""The limits of a talk and how its words are drawn: a run's [dialogue]."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from duologue.model.settings import check, setting
from duologue.rollout.engine.sequence import LEAST_TEMPERATURE, SamplingParams
from duologue.rollout.seeds import derive_seed
from duologue.rollout.selfplay.dialogue import FINAL


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A round is one exchange: both sides speak once.

    With context "full" a side's context grows and its KV stays; with "last_2" each turn sees the two before
    it, in a context of its own. Who speaks first is drawn per group ("random"), side 0 ("first"), or
    alternates from group to group and step to step. A truncated draw (top_p) is trained by the distribution
    that it was drawn from.
    """

    max_rounds: int = setting(5, "rounds at most; in one, both sides speak once", least=1)
    max_tokens_per_turn: int = setting(48, "tokens of a turn at most", least=1)
    max_tokens_final: int = setting(12, "tokens of a final statement at most", least=1)
    context: str = setting("full", "what a side has heard when it speaks", one_of=("full", "last_2"))
    temperature: float = setting(
        1.0, "of all draws; 0 takes the likeliest token", least=0, most=100, gap=LEAST_TEMPERATURE
    )
    top_p: float = setting(1.0, "probability that a draw is cut to", above=0, most=1)
    final_temperature: float = setting(
        -1.0, "of a final statement; below 0: as temperature", least=-1, most=100, gap=LEAST_TEMPERATURE
    )
    final_top_p: float = setting(0.0, "of a final statement; 0: as top_p", least=0, most=1)
    first_speaker: str = setting("random", "side that speaks first", one_of=("random", "first", "alternate"))
    step_scores: bool = False  # no key: the score is noted before each turn, as it stands (grpo.credit)
    always_final: bool = False  # no key: a final is written, not scored, where a judge saw no agreement too

    def __post_init__(self) -> None:
        check("dialogue", self)

    def sampling(self, kind: int, seed: int, stop_token_ids: Iterable[int]) -> SamplingParams:
        """How words of `kind` are drawn."""
        final = kind == FINAL
        temperature = self.final_temperature if final and self.final_temperature >= 0 else self.temperature
        top_p = self.final_top_p if final and self.final_top_p else self.top_p
        return SamplingParams(
            max_new_tokens=self.max_tokens_final if final else self.max_tokens_per_turn,
            temperature=temperature,
            top_p=top_p if temperature > 0 else 1.0,
            seed=seed,
            stop_token_ids=tuple(stop_token_ids),
        )

    def opener(self, seed: int, group: int, step: int) -> int:
        """The side that speaks first."""
        if self.first_speaker == "random":
            return derive_seed(seed, group, "first") % 2
        return (group + step) % 2 if self.first_speaker == "alternate" else 0
