"""The decoder's configuration, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """`kind` "linear" divides positions by `factor`; "llama3" divides low frequencies only (see decoder.rope_frequencies)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama, Qwen2 or Qwen3 decoder."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type = {self.model_type!r}: accepted is one of {', '.join(FAMILIES)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} attention heads are no multiple of {self.num_kv_heads} key-value heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}: accepted is an even number (rotary embedding works on pairs)")

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """From the object in config.json; a missing key raises ValueError with its name."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type = {family!r} in config.json: accepted is one of {', '.join(FAMILIES)}")
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for key in needed:
            if key not in raw:
                raise ValueError(f"config.json lacks {key!r}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act = {raw['hidden_act']!r} in config.json: accepted is 'silu'")
        if raw.get("use_sliding_window"):
            raise ValueError("use_sliding_window = true in config.json: only full attention is accepted")
        bias = bool(raw.get("attention_bias", False)) or family == "qwen2"
        theta, scaling = _rope(raw)
        eos = raw.get("eos_token_id")
        return cls(
            model_type=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            max_position_embeddings=raw.get("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            bos_token_id=raw.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json, in the form that transformers 4 and 5 both read."""
        scaling = self.rope_scaling
        rope: dict[str, Any] = {"rope_type": scaling.kind if scaling else "default"}
        if scaling:
            rope["factor"] = scaling.factor
        if scaling and scaling.kind == "llama3":
            rope["low_freq_factor"] = scaling.low_freq_factor
            rope["high_freq_factor"] = scaling.high_freq_factor
            rope["original_max_position_embeddings"] = scaling.original_max_position
        raw: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rope_scaling": rope if scaling else None,
            "tie_word_embeddings": self.tie_word_embeddings,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_id) if len(self.eos_token_id) > 1 else next(iter(self.eos_token_id), None),
        }
        if self.model_type != "qwen2":
            raw["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            raw["mlp_bias"] = self.mlp_bias
        return raw


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from either layout: `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (4)."""
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r} in config.json: accepted is one of {', '.join(ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    return theta, RopeScaling(
        kind=kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        original_max_position=int(rope.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))),
    )
