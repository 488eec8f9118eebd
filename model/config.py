"""The decoder's configuration, read from and written to Hugging Face's `config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LARGEST_FLOAT, TINY = 3.4e38, 1e-30  # of a number: what fp32 holds, and well above its smallest
LARGEST = 2**24  # of a size
MAX_LAYERS = 1024
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
BIASES = {  # (qkv, o, mlp)
    "llama": ((False, False, False), (True, True, False), (False, False, True), (True, True, True)),
    "qwen2": ((True, False, False),),
    "qwen3": ((False, False, False), (True, True, False)),
}
# Settings that would change what the model computes, or from where, and what each may be here.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),  # two names of one function
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "is_causal": (True,),
    "transformers_weights": (None, "model.safetensors"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long texts (rotary.rope_frequencies).

    `kind` "linear" divides every one by `factor`, "llama3" and "yarn" the low ones only: those that turn
    less often than `low_freq_factor` or `beta_slow` times in the original context.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # whether yarn's limits are whole dimensions
    attention_factor: float = 1.0  # on cosine and sine


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A Llama, Qwen2 or Qwen3 decoder. The family decides what can be said and if heads are normalised."""

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
    # The object of the config.json that this came from: what is said there beyond the above is kept.
    raw: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type = {self.model_type!r}: accepted is one of {', '.join(FAMILIES)}")
        layer = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in (*layer, "vocab_size", "num_layers", "max_position_embeddings"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} = {value!r}: accepted is an integer >= 1")
            most = MAX_LAYERS if name == "num_layers" else LARGEST
            if value > most:
                raise ValueError(f"{name} = {value}: accepted is {most} at most")
        if self.num_heads * self.head_dim > LARGEST:
            raise ValueError(f"num_heads = {self.num_heads} of {self.head_dim}: accepted is {LARGEST} in all")
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
        if not isinstance(family, str) or family not in FAMILIES:
            raise ValueError(
                f"model_type = {family!r} in config.json: accepted is one of {', '.join(FAMILIES)}"
            )
        _check_fixed(raw)
        bias = _flag(raw, "attention_bias") or family == "qwen2"
        theta, scaling = _rope(raw, max_position := _positions(raw))
        heads, hidden = _required(raw, "num_attention_heads"), _required(raw, "hidden_size")
        layers = _required(raw, "num_hidden_layers")
        _check_windows(raw, layers, max_position)
        # What is left out has transformers' defaults, which differ between families.
        kv_heads, head_dim = (
            raw.get("num_key_value_heads", None if family == "llama" else 32),
            raw.get("head_dim"),
        )
        usual_head_dim = 128 if family == "qwen3" else max(hidden // heads, 1)
        return cls(
            model_type=family,
            vocab_size=_required(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_required(raw, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads if kv_heads is None else kv_heads,
            head_dim=usual_head_dim if head_dim is None else head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6, least=0.0),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=bias,
            o_bias=bias and family != "qwen2",
            mlp_bias=_flag(raw, "mlp_bias") and family == "llama",
            dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            bos_token_id=next(iter(token_ids(raw, "bos_token_id", "config.json", most=1)), None),
            eos_token_id=token_ids(raw, "eos_token_id", "config.json"),
            raw=raw,
        )

    def _rope_to_hf(self) -> dict[str, Any]:
        scaling = self.rope_scaling
        if scaling is None:
            return {"rope_type": "default"}
        names = {
            "linear": (),
            "llama3": ("low_freq_factor", "high_freq_factor"),
            "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor"),
        }[scaling.kind]
        rope: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
        rope |= {name: getattr(scaling, name) for name in names}
        if scaling.kind != "linear":
            rope["original_max_position_embeddings"] = scaling.original_max_position
        return rope

    def to_hf(self) -> dict[str, Any]:
        """The object for config.json, in the form that transformers 4 and 5 both read."""
        rope, scaling = self._rope_to_hf(), self.rope_scaling
        raw: dict[str, Any] = {
            "architectures": [FAMILIES[self.model_type]],
            "hidden_act": "silu",
            **self.raw,
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
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


def token_ids(raw: dict[str, Any], key: str, file: str, most: int | None = None) -> tuple[int, ...]:
    """Ids as Hugging Face's files write them: null, a number, or a list; ValueError names `file`."""
    value = raw.get(key)
    ids = value if isinstance(value, list) and most is None else [] if value is None else [value]
    for i in ids:
        if type(i) is not int:
            accepted = "null or an integer" + (", or a list of integers" if most is None else "")
            raise ValueError(f"{key} = {value!r} in {file}: accepted is {accepted}")
    return tuple(ids)


def _required(raw: dict[str, Any], key: str) -> int:
    if type(raw.get(key)) is not int or not 1 <= raw[key] <= LARGEST:
        problem = f"{key} = {raw[key]!r} in config.json" if key in raw else f"config.json lacks {key!r}"
        raise ValueError(f"{problem}: accepted is an integer from 1 to {LARGEST}")
    value: int = raw[key]
    return value


def _flag(raw: dict[str, Any], key: str, default: bool = False) -> bool:
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise ValueError(f"{key} = {value!r} in config.json: accepted is true or false")
    return default if value is None else value


def _number(
    raw: dict[str, Any], key: str, default: float, above: float | None = None, least: float | None = None
) -> float:
    """A finite number within its limits; null is the default."""
    value = default if raw.get(key) is None else raw[key]
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    if not number or (above is not None and value <= above) or (least is not None and value < least):
        limit = (
            f" above {above:g}"
            if above is not None
            else f" of at least {least:g}"
            if least is not None
            else ""
        )
        raise ValueError(f"{key} = {value!r} in config.json: accepted is a finite number{limit}")
    return float(value)


def _positions(raw: dict[str, Any]) -> int:
    value = raw.get("max_position_embeddings", 2048 if raw["model_type"] == "llama" else 32_768)
    return _required({"max_position_embeddings": value}, "max_position_embeddings")


def _check_fixed(raw: dict[str, Any]) -> None:
    if raw.get("attention_dropout") not in (None, 0) or raw.get("attention_dropout") is False:
        raise ValueError(
            f"attention_dropout = {raw['attention_dropout']!r} in config.json: accepted is 0, with which "
            "sampling computes the same and updates drop nothing (lora.dropout drops in an adapter)"
        )
    for key, accepted in FIXED.items():
        value = raw.get(key, accepted[0])
        same = [a for a in accepted if a == value and isinstance(a, bool) == isinstance(value, bool)]
        if not same:
            raise ValueError(f"{key} = {value!r} in config.json: accepted is {accepted[0]!r}")


def _check_windows(raw: dict[str, Any], layers: int, max_position: int) -> None:
    """Refuse a sliding window that changes a layer: one that is on, in some layer, within the context."""
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            raise ValueError(f"layer_types = {types!r} in config.json: accepted is null or a list of strings")
        if other := set(types) - {"full_attention"}:
            raise ValueError(f"layer_types = {sorted(other)} in config.json: accepted is 'full_attention'")
        if len(types) != layers:
            raise ValueError(f"layer_types in config.json has {len(types)} entries: accepted is {layers}")
        return
    if not _flag(raw, "use_sliding_window"):
        return
    window, first = raw.get("sliding_window", 4096), raw.get("max_window_layers", 28)
    for key, value in (("sliding_window", window), ("max_window_layers", first)):
        if value is not None and type(value) is not int:
            raise ValueError(f"{key} = {value!r} in config.json: accepted is an integer")
    unused = window is None or window >= max_position or (first is not None and first >= layers)
    if raw["model_type"] == "llama" or not unused:
        raise ValueError(
            f"use_sliding_window = True in config.json with sliding_window = {window} from layer {first} on: "
            "accepted is False, or a window that no layer has"
        )


def _rope(raw: dict[str, Any], max_position: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) by `rope_parameters` (transformers 5), or by `rope_theta` and `rope_scaling` (4).

    As in transformers `rope_scaling` counts where it is set; what the other key says beyond it is refused.
    """
    layouts: dict[str, tuple[float, RopeScaling | None]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"{key} = {rope!r} in config.json: accepted is null or an object")
        if rope:
            layouts[key] = _rope_settings(raw, key, rope, max_position)
    theta = _number(raw, "rope_theta", 10_000.0, above=TINY)
    if not layouts:
        return theta, None
    key = next(iter(layouts))
    chosen, (other_theta, other) = layouts[key], layouts.get("rope_parameters", layouts[key])
    if other not in (None, chosen[1]) or other_theta != chosen[0]:
        raise ValueError(
            f"rope_scaling = {raw['rope_scaling']} disagrees with rope_parameters = {raw['rope_parameters']} "
            "in config.json: accepted is one of them, the other null"
        )
    if raw.get("rope_theta") is not None and theta != chosen[0]:
        raise ValueError(
            f"rope_theta = {theta:g} in config.json, and {chosen[0]:g} in {key}: accepted are equal ones"
        )
    return chosen


def _rope_settings(
    raw: dict[str, Any], where: str, rope: dict[str, Any], max_position: int
) -> tuple[float, RopeScaling | None]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type = {kind!r} in config.json: accepted is one of {', '.join(ROPE_TYPES)}")
    if rope.get("type", kind) != kind:
        raise ValueError(
            f"type = {rope['type']!r} in {where} of config.json: accepted is its rope_type, {kind!r}"
        )
    if nested := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ValueError(f"{where} in config.json speaks of {nested}: accepted is one for all layers")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} in config.json: accepted is 1.0"
        )
    theta = _number({**raw, **rope}, "rope_theta", 10_000.0, above=TINY)
    if kind == "default":
        return theta, None
    names = {"llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ("factor",))
    if missing := [name for name in names if rope.get(name) is None]:
        raise ValueError(f"rope_type = {kind!r} in config.json lacks {', '.join(missing)}")
    numbers = {name: _number(rope, name, 0.0, above=1e-6) for name in names}
    if kind == "linear":
        return theta, RopeScaling(kind=kind, factor=numbers["factor"])
    key = "original_max_position_embeddings"  # beside the other keys of config.json it counts more
    original = _required({key: raw.get(key, rope.get(key, max_position))}, key)
    if kind == "llama3":
        _number(rope, "high_freq_factor", 0.0, above=numbers["low_freq_factor"])
        return theta, RopeScaling(
            kind=kind,
            factor=numbers["factor"],
            low_freq_factor=numbers["low_freq_factor"],
            high_freq_factor=numbers["high_freq_factor"],
            original_max_position=original,
        )
    if theta == 1.0:
        raise ValueError("rope_theta = 1 in config.json: accepted with rope_type 'yarn' is any other")
    usual = {"beta_fast": 32.0, "beta_slow": 1.0}  # of what is null or, as in transformers, 0
    betas = {name: _number({name: rope.get(name) or n}, name, n, above=TINY) for name, n in usual.items()}
    return theta, RopeScaling(
        kind=kind,
        factor=numbers["factor"],
        original_max_position=original,
        beta_fast=betas["beta_fast"],
        beta_slow=betas["beta_slow"],
        truncate=_flag(rope, "truncate", True),
        attention_factor=_attention_factor(rope, numbers["factor"]),
    )


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    """YaRN's (Peng et al. 2023, arXiv 2309.00071), or the ratio of two of them (DeepSeek's mscale)."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights = [_number(rope, name, 0.0, least=0.0) for name in ("mscale", "mscale_all_dim")]
    usual = mscale(weights[0]) / mscale(weights[1]) if all(weights) else mscale(1.0)
    return _number(rope, "attention_factor", usual, above=0.0)
