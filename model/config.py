"""The decoder's configuration, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3")
BIASES = {  # (qkv, o, mlp)
    "llama": ((False, False, False), (True, True, False), (False, False, True), (True, True, True)),
    "qwen2": ((True, False, False),),
    "qwen3": ((False, False, False), (True, True, False)),
}
# Settings that would change what the model computes, and the only value of each that is computed here.
FIXED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """`kind` "linear" divides every frequency by `factor`, "llama3" the low ones only
    (decoder.rope_frequencies).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama, Qwen2 or Qwen3 decoder. The family decides what can be said and whether heads are
    normalised."""

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
        layer = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*layer, "vocab_size", "num_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r}: accepted is an integer >= 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads}: accepted is a multiple of {self.num_kv_heads} key heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim = {self.head_dim}: accepted is an even number (rotary embedding turns pairs)"
            )
        biases = (self.qkv_bias, self.o_bias, self.mlp_bias)
        accepted = BIASES[self.model_type]
        if biases not in accepted:  # a checkpoint of this family could not say it
            raise ValueError(
                f"(qkv_bias, o_bias, mlp_bias) = {biases}: accepted for {self.model_type} is {accepted}"
            )

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head."""
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> ModelConfig:
        """From the object in config.json; what is missing or not computed here raises ValueError with its
        name.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(
                f"model_type = {family!r} in config.json: accepted is one of {', '.join(FAMILIES)}"
            )
        for key, accepted in FIXED.items():
            if raw.get(key, accepted) not in (accepted, None):
                raise ValueError(f"{key} = {raw[key]!r} in config.json: accepted is {accepted!r}")
        if other := set(raw.get("layer_types") or ()) - {"full_attention"}:
            raise ValueError(f"layer_types = {sorted(other)} in config.json: accepted is 'full_attention'")
        bias = bool(raw.get("attention_bias", False)) or family == "qwen2"
        theta, scaling = _rope(raw)
        heads = _required(raw, "num_attention_heads")
        hidden = _required(raw, "hidden_size")
        eos = raw.get("eos_token_id")
        return cls(
            model_type=family,
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_required(raw, "intermediate_size"),
            num_layers=_required(raw, "num_hidden_layers"),
            num_heads=heads,
            # What is left out has transformers' defaults, which differ between families.
            num_kv_heads=raw.get("num_key_value_heads") or (heads if family == "llama" else 32),
            head_dim=raw.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
            max_position_embeddings=raw.get("max_position_embeddings", 2048 if family == "llama" else 32_768),
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
            "eos_token_id": one_or_list(self.eos_token_id),
        }
        if self.model_type != "qwen2":
            raw["attention_bias"] = self.qkv_bias
        if self.model_type == "llama":
            raw["mlp_bias"] = self.mlp_bias
        return raw


def one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    """Ids as Hugging Face's files write them: null, a number, or a list."""
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _required(raw: dict[str, Any], key: str) -> int:
    if type(raw.get(key)) is not int or raw[key] < 1:
        problem = f"{key} = {raw[key]!r} in config.json" if key in raw else f"config.json lacks {key!r}"
        raise ValueError(f"{problem}: accepted is an integer >= 1")
    value: int = raw[key]
    return value


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of either layout: `rope_parameters` (transformers 5), or `rope_theta` and
    `rope_scaling` (4).
    """
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r} in config.json: accepted is one of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} in config.json: accepted is 1.0"
        )
    if kind == "default":
        return theta, None
    names = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}[kind]
    if missing := [name for name in names if name not in rope]:
        raise ValueError(f"rope_type = {kind!r} in config.json lacks {', '.join(missing)}")
    original = rope.get("original_max_position_embeddings", raw.get("max_position_embeddings", 8192))
    numbers = {name: float(rope[name]) for name in names}
    return theta, RopeScaling(kind=kind, original_max_position=int(original), **numbers)
