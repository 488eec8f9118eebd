"""The sections of a run's configuration: each key with its default, its meaning and what is accepted.

Rules between keys stand in `config.py`. Sections of a lower layer are that layer's own settings.
"""

# ruff: noqa: RUF009 - Shares cannot be changed

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from duologue.grpo.ability.prompts import OWN
from duologue.grpo.loss import LossConfig
from duologue.grpo.mix import FROZEN, LAGGED, PARTNER, PARTNERS, POOL, START
from duologue.grpo.optimizer import SCHEDULES
from duologue.kernels.advantage import METHODS
from duologue.model.hub import local
from duologue.model.lora import LoraSettings
from duologue.model.recompute import LAYER, NORMS, NOTHING
from duologue.model.settings import Shares, keys, like, setting
from duologue.model.tokenizer import LEAST_IDS
from duologue.model.weights import DTYPES
from duologue.rollout.engine.pages import CACHE_TOKENS
from duologue.rollout.engine.sequence import LEAST_TEMPERATURE
from duologue.rollout.judge.form import ORDERS
from duologue.rollout.judge.model import EXPECTED, LIKELIEST

SERVED = ("temperature", "max_tokens")  # keys of [judge] that only a server's answers depend on,
HELD = ("threshold", "score", "readings")  # and only those of a model in this process
NOBODY = Shares()
HTTP_ADDRESS = "an address that begins with http:// or https://"


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The policy: a checkpoint, or a Qwen3 decoder of the sizes below that starts from nothing."""

    path: str = setting(
        "", "folder of a Hugging Face checkpoint, or its name in the Hub; '' starts from nothing"
    )
    device: str = setting("cpu", "where the model is", form=r"cpu|cuda(:\d+)?", words="cpu, cuda or cuda:N")
    dtype: str = setting(
        "float32",
        "of the weights; where nothing is said with a path, that of the checkpoint, where the device has it",
        one_of=DTYPES,
    )
    hidden_size: int = setting(128, "width of the residual stream", least=1)
    intermediate_size: int = setting(384, "width of an MLP", least=1)
    num_layers: int = setting(4, "decoder layers", least=1)
    num_heads: int = setting(4, "query heads, a multiple of num_kv_heads", least=1)
    num_kv_heads: int = setting(2, "key and value heads", least=1)
    head_dim: int = setting(0, "an even number; 0 is hidden_size / num_heads", least=0, most=256)
    vocab_size: int = setting(512, "ids of the tokenizer that is trained, at most", least=LEAST_IDS)
    max_position: int = setting(512, "tokens of the longest context", least=32)

    @property
    def folder(self) -> Path:
        """Of the checkpoint at `path`, fetched from the Hub where that names one."""
        return local(self.path)


@dataclass(frozen=True, kw_only=True)
class ImitationSection:
    """Imitating scripted negotiators before self-play."""

    steps: int = setting(0, "optimizer steps; 0 skips the stage", least=0)
    dialogues: int = setting(20_000, "size of the scripted corpus", least=1)
    characters: tuple[str, ...] = setting(
        (), "whom the corpus is made of, each as often as named; empty: the game's own mixture"
    )
    dialogues_per_step: int = setting(64, "drawn from the corpus for a step", least=1)
    final_weight: float = setting(
        1.0, "of a final statement's tokens in the loss, those of utterances being 1", least=0.01, most=1000
    )
    decisive_weight: float = setting(
        1.0, "of words on which depends what comes next, in games told in English", least=0.01, most=1000
    )
    learning_rate: float = setting(2e-3, "at its peak; then a cosine", least=1e-12, most=1)
    warmup_steps: int = setting(20, "steps of linear warm-up", least=0)


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The run as a whole."""

    steps: int = setting(100, "steps of self-play", least=0)
    seed: int = setting(0, "every random draw follows from it", least=0, most=2**31)
    save_every: int = setting(25, "steps from one checkpoint to the next", least=1)
    keep_checkpoints: int = setting(2, "the latest that stay", least=1)
    tokens_per_microbatch: int = setting(
        16_384, "tokens that go through the model at once; 0: what a GPU's memory holds", least=0
    )
    max_seconds: float = setting(
        0.0, "of training time; self-play ends after the step that passes it; 0 is no limit", least=0
    )
    best_by: str = setting(
        "reward",
        "of which measure checkpoints/best has the most in the evaluations of eval.every: with itself, after "
        "'start:' with its start; after '-' the least",
        form=r"-?(start:)?\w+",
        words="a measure of the game, 'reward', or 'start:' and one of "
        "agreement, policy, opponent, policy_points, opponent_points, score",
    )
    patience: int = setting(
        0, "evaluations of eval.every in a row without a better one, at which self-play ends; 0: any", least=0
    )
    threads: int = setting(0, "of the CPU; 0 is all cores", least=0, most=4096)
    tensorboard: bool = setting(False, "whether RUN_DIR/tensorboard gets the metrics as event files")
    wandb: str = setting("", "the project of Weights & Biases that gets the metrics; '': none")
    record_tokens: int = setting(
        0,
        "steps from one whose dialogues are recorded with the entropy and the support size of their tokens, "
        "and with the answers of the judge, to the next; evaluations are too; 0: none",
        least=0,
    )
    rank_timeout_s: float = setting(
        1800.0, "that the ranks of a run wait for one of them before all end", least=1, most=1e6
    )
    recompute: str = setting(
        NOTHING,
        "what a backward computes a second time, to keep less: 'norms', the outputs of norms and of "
        "silu(gate) * up; 'layer', all but the inputs of layers",
        one_of=(NOTHING, NORMS, LAYER),
    )
    offload_moments: bool = setting(False, "keep the moments of AdamW in the host's memory; of a run on CUDA")
    attention_backward: str = setting(
        "own",
        "who takes the backward of exact attention: 'library', flash-attn or else torch, in 16 bits on CUDA",
        one_of=("own", "library"),
    )
    gradient_accumulation_fusion: bool = setting(
        False, "add up the gradients of linears in fp32 as they are multiplied: never rounded to bf16 before"
    )
    shares: int = setting(
        0,
        "fixed shares of a step's rows, a multiple of the ranks: the same bits for any number of them; 0: as "
        "many as there are ranks",
        least=0,
        most=4096,
    )
    max_bad_updates: int = setting(
        3, "updates in a row that are skipped as not finite before the run ends", least=1
    )
    kl_every: int = setting(
        10, "steps from one measurement of the KL to the start to the next; 0: none", least=0
    )


@dataclass(frozen=True, kw_only=True)
class GrpoSection:
    """A step of self-play: how much is played, what of it is trained, and how."""

    group_size: int = setting(8, "dialogues of one scenario", least=2)
    groups_per_step: int = setting(16, "scenarios of a step", least=1)
    resample: int = setting(
        0,
        "rounds in which groups that teach nothing are played again from other scenarios",
        least=0,
        most=100,
    )
    updates_per_rollout: int = setting(1, "optimizer steps on the same dialogues", least=1, most=100)
    train_roles: str = setting("both", "the sides that are trained", one_of=("both", "first"))
    train_kinds: tuple[str, ...] = setting(
        ("utterance", "final"), "the kinds of turn that are trained", one_of=("utterance", "final")
    )
    learning_rate: float = setting(1e-4, "at its peak", least=1e-12, most=1)
    warmup_steps: int = setting(5, "steps of linear warm-up", least=0)
    schedule: str = setting("constant", "of the learning rate after the warm-up", one_of=SCHEDULES)
    weight_decay: float = setting(0.0, "of matrices", least=0, most=1)
    betas: tuple[float, ...] = setting((0.9, 0.95), "of AdamW: two numbers from 0 to below 1")
    max_grad_norm: float = setting(1.0, "to which gradients are clipped; 0: not at all", least=0)
    loss: str = like(LossConfig, "variant")
    clip_low: float = like(LossConfig, "clip_low")
    clip_high: float = like(LossConfig, "clip_high")
    dual_clip: float = like(LossConfig, "dual_clip")
    advantage: str = setting(
        "std", "how rewards of a group become advantages (grpo/advantage.py)", one_of=METHODS
    )
    credit: str = setting(
        "dialogue",
        "what a turn is trained with: 'dialogue', the whole reward; 'turn', what came from it on, of a game "
        "whose score is known before its end",
        one_of=("dialogue", "turn"),
    )
    per_role: bool = setting(True, "whether each side is compared with its own side of the group only")
    kl_coef: float = like(LossConfig, "kl_coef")
    kl_estimator: str = like(LossConfig, "kl_estimator")
    entropy_coef: float = like(LossConfig, "entropy_coef")
    tis_cap: float = like(LossConfig, "tis_cap")
    imitation_coef: float = setting(0.0, "weight of imitation batches mixed into the updates", least=0)

    @property
    def loss_config(self) -> LossConfig:
        names = [field.name for field in keys(LossConfig) if field.name != "variant"]
        return LossConfig(variant=self.loss, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class LoraSection:
    """An adapter on the frozen weights of model.path."""

    rank: int = setting(0, "0 trains all weights; above, only an adapter of this rank", least=0, most=4096)
    alpha: float = like(LoraSettings, "alpha")
    targets: tuple[str, ...] = like(LoraSettings, "targets")
    dropout: float = like(LoraSettings, "dropout")
    quantize: str = setting("", "'nf4': the frozen layers in four bits, by bitsandbytes", one_of=("", "nf4"))

    def settings(self, base: str) -> LoraSettings:
        """Of an adapter on the weights in the folder `base`."""
        return LoraSettings(
            rank=self.rank, alpha=self.alpha, targets=self.targets, dropout=self.dropout, base=base
        )


@dataclass(frozen=True, kw_only=True)
class JudgeSection:
    """Who scores a dilemma; a game with rules scores itself."""

    backend: str = setting(
        "rules",
        "'endpoint': the server at url; 'model': the checkpoint in the folder model; 'policy': the starting "
        "weights",
        one_of=("rules", "endpoint", "model", "policy"),
    )
    url: str = setting(
        "", "of an OpenAI-compatible server", form=r"(https?://[^/].*)?", words=f"'' or {HTTP_ADDRESS}"
    )
    model: str = setting("", "the server's name of the model, or a folder")
    key_env: str = setting("DUOLOGUE_JUDGE_KEY", "the environment variable that holds the server's API key")
    prompts: str = setting("", "a folder of prompts that replace the package's")
    show_dialogue: bool = setting(False, "to the scorer too")
    ledger: str = setting("", "the file of all answers; '' is judge.sqlite in the run directory")
    offline: bool = setting(False, "ask nobody: all answers come from the ledger")
    concurrency: int = setting(16, "questions on the wire at once", least=1, most=4096)
    timeout_s: float = setting(60.0, "of a request", least=0.01)
    deadline_s: float = setting(240.0, "of a question with all its tries", least=0.01)
    temperature: float = setting(0.0, "of a server's answers", least=0, most=100)
    max_tokens: int = setting(512, "of a server's answer", least=1)
    threshold: float = setting(
        0.5, "how probable 'true' must be against 'false' for an agreement, of a model here", least=0, most=1
    )
    score: str = setting(
        EXPECTED, "of the probabilities of 0 to 5, of a model here", one_of=(EXPECTED, LIKELIEST)
    )
    readings: int = setting(
        4, "orders of the aspects over which a model here averages", least=1, most=len(ORDERS)
    )
    max_unscored_share: float = setting(0.1, "of a step's dialogues; above it the run stops", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class OpponentSection:
    """Whom the policy meets in training. "self": the policy as it is, on both sides. Otherwise the policy has
    one side, in turn from group to group (side 0 with grpo.train_roles = "first"), and only its own tokens
    are trained. "start", and "frozen" without a path: the policy at the start of self-play. "frozen": the
    checkpoint at `path`. "lagged:k": the policy k steps ago. "pool": a snapshot of it, drawn for every group.
    "scripted": each of the game's characters; "scripted:NAME": one of them. "endpoint": a server. "mix": each
    group of a step meets one of those that `mix` names, as often as their shares say.

    With lora.rank above 0 earlier selves are adapters in the policy's own engine steps, and "start" is the
    base with no adapter. Without, other weights are held beside the policy's, with a KV pool for each set,
    and a step draws from "pool" as many snapshots as there is room for. Snapshots are checkpoints in
    RUN_DIR/opponents: "lagged:k" keeps the last k + train.save_every, "pool" the last `size`.
    """

    kind: str = setting(
        "self",
        "who has the other side",
        form=rf"{PARTNER}|mix",
        words=f"{PARTNERS}, 'endpoint' or 'mix'",
    )
    mix: Shares = setting(
        NOBODY,
        "with kind 'mix', the share of groups that meet each, e.g. {self = 0.5, start = 0.3, pool = 0.2}",
        form=PARTNER,
        words=f"a table of shares of {PARTNERS} or 'endpoint'",
    )
    held: int = setting(
        0, "sets of other weights held at once; 0: one for each kind of partner that needs one", least=0
    )
    path: str = setting("", "folder of the checkpoint that 'frozen' is; '' is the start of self-play")
    pool_every: int = setting(
        10, "steps from one snapshot to the next; the first is the start", least=1, words="1 or more"
    )
    pool_size: int = setting(8, "snapshots, the latest", least=1, words="1 or more")
    pool_draw: str = setting(
        "uniform",
        "how a snapshot is drawn; with 'recent' the n-th oldest has weight n",
        form="uniform|recent",
        words="'uniform' or 'recent'",
    )
    url: str = setting("", "of an OpenAI-compatible server, with kind 'endpoint'")
    model: str = setting("", "the server's name of the model")
    key_env: str = setting(
        "DUOLOGUE_OPPONENT_KEY", "the environment variable that holds the server's API key"
    )
    concurrency: int = setting(16, "turns on the wire at once", least=1, words="1 or more")
    timeout_s: float = setting(60.0, "of a request", least=0.01, words="0.01 or more")
    deadline_s: float = setting(240.0, "of a turn with all its tries", least=0.01, words="0.01 or more")

    @property
    def parts(self) -> dict[str, float]:
        """The part of all groups that meets each partner; they add up to 1."""
        if self.kind == "mix":
            return self.mix.parts
        return {START if self.kind == FROZEN and not self.path else self.kind: 1.0}

    @property
    def lags(self) -> list[int]:
        """The k of each "lagged:k"."""
        return [int(name.removeprefix(LAGGED)) for name in self.parts if name.startswith(LAGGED)]

    def sets(self, adapters: bool) -> int:
        """How many sets of weights beside the policy's are needed at least, with or without adapters."""
        selves = sum(name in (START, POOL) or name.startswith(LAGGED) for name in self.parts)
        return (FROZEN in self.parts) + (0 if adapters else selves)


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """The engine that samples dialogues."""

    page_size: int = setting(16, "tokens of a page of the KV pool, a multiple of 16", least=16, most=1024)
    cache_tokens: int = setting(
        CACHE_TOKENS,
        "tokens of the KV pool; 0 is 85 % of the GPU memory that is free when it is made, given back during "
        "updates",
        least=0,
    )
    max_batch: int = setting(256, "dialogues in an engine step", least=1)
    max_step_tokens: int = setting(1_024, "tokens of an engine step, prefill and decode together", least=1)
    exact: bool = setting(True, "whether sampling and training give the same log-probs to the last bit")
    release_memory: bool = setting(False, "give the KV pool's memory back during each update")

    @property
    def released(self) -> bool:
        """Whether the KV pool's memory is given back during an update."""
        return self.release_memory or not self.cache_tokens


@dataclass(frozen=True, kw_only=True)
class EvalSection:
    """How a policy is measured, before and after self-play."""

    dialogues: int = setting(500, "dialogues of the policy with itself", least=1)
    split: str = setting("heldout", "of the scenarios", one_of=("heldout", "train"))
    temperature: float = setting(
        1.0, "of the policy's words; 0 takes the likeliest", least=0, most=100, gap=LEAST_TEMPERATURE
    )
    partners: tuple[str, ...] = setting(
        ("start", "scripted"),
        "whom the policy meets at the end of a run of a game with rules: 'start', 'scripted' (all of the "
        "game's characters), 'scripted:NAME'",
        form=r"start|scripted(:\w+)?",
        words="'start', 'scripted' or 'scripted:NAME'",
    )
    partner_dialogues: int = setting(
        50, "dialogues with each of them, as either side and with either side first", least=1
    )
    ability: bool = setting(
        True, "whether a run that began from a checkpoint measures at its end what its language has lost"
    )
    ability_prompts: int = setting(
        OWN, "instructions that can be checked, of the package's", least=1, most=OWN
    )
    ability_tokens: int = setting(256, "of the answer to one of them, at most", least=1)
    ifeval: str = setting("", "a .jsonl file of prompts in IFEval's format in place of the package's")
    every: int = setting(
        0,
        "steps of self-play from one small evaluation, with itself and with its start, to the next; 0: none",
        least=0,
    )
    every_dialogues: int = setting(
        32, "contexts of such an evaluation: a dialogue with itself, two with its start", least=1
    )
    questions: str = setting("", "a .jsonl file of open-ended questions in place of the package's")
    judge_url: str = setting("", "the server of a second judge, which compares answers")
    judge_model: str = setting("", "the server's name of its model")
