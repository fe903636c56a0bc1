"""Rotary positions in the formats of transformers 4 and 5."""

from typing import Any

from ...models import LlamaConfig
from ...nn import DynamicScaling, LinearScaling, Llama3Scaling, LongRoPEScaling, YaRNScaling
from .._fields import Fields


def read_rope(
    fields: Fields,
    max_len: int,
    *,
    theta: float = 10_000.0,
    fraction: float | None = None,
    original_max_len: int | None = None,
) -> dict[str, Any]:
    """Rotary positions, in the format of transformers 4 or 5.

    Arguments:

    - `fields`: to read.
    - `max_len`: the longest sequence.
    - `theta`, `original_max_len`: what a missing field means.
    - `fraction`: the same; `None` if transformers rotates all features, whatever the field.
    """
    theta = fields.take("rope_theta", theta)
    fraction = _read_fraction(fields, fraction)
    original_max_len = fields.take("original_max_position_embeddings", original_max_len)
    old, new = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    if old is not None and new is not None:
        raise ValueError("there are both rope_scaling and rope_parameters; remove one of them.")
    return read_rope_parameters(
        old or new or Fields({}, ""),
        max_len,
        theta=theta,
        fraction=fraction,
        original_max_len=original_max_len,
    )


def read_rope_parameters(
    fields: Fields,
    max_len: int,
    *,
    theta: float = 10_000.0,
    fraction: float | None = None,
    original_max_len: int | None = None,
) -> dict[str, Any]:
    """Rotary positions from the nested object; see `read_rope`."""
    theta = fields.take("rope_theta", theta)
    fraction = _read_fraction(fields, fraction)
    in_here = fields.take("original_max_position_embeddings", None)
    original = original_max_len or in_here or max_len
    old_name = fields.take("type", "default")
    kind = fields.take("rope_type", old_name)
    if kind == "su" or (kind == "yarn" and fields.has("short_factor")):
        # Phi-3's name for it, before it had one.
        kind = "longrope"
    longest = max_len
    scaling: Any = None
    if kind == "linear":
        scaling = LinearScaling(factor=fields.take("factor"))
    elif kind == "dynamic":
        # It applies beyond the length of training, which is what this field means here.
        scaling = DynamicScaling(factor=fields.take("factor"), original_max_len=max_len)
        longest = int(scaling.factor * max_len)
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=fields.take("factor"),
            low_freq_factor=fields.take("low_freq_factor"),
            high_freq_factor=fields.take("high_freq_factor"),
            original_max_len=original,
        )
    elif kind == "yarn":
        scaling = YaRNScaling(
            factor=fields.take("factor", None) or max_len / original,
            original_max_len=original,
            beta_fast=fields.take("beta_fast", None) or 32.0,
            beta_slow=fields.take("beta_slow", None) or 1.0,
            truncate=fields.take("truncate", True),
            attention_factor=fields.take("attention_factor", None),
            mscale=fields.take("mscale", None) or 0.0,
            mscale_all_dim=fields.take("mscale_all_dim", None) or 0.0,
        )
        fields.ignore("finetuned")
    elif kind == "longrope":
        scaling = LongRoPEScaling(
            short_factors=tuple(fields.take("short_factor")),
            long_factors=tuple(fields.take("long_factor")),
            factor=fields.take("factor", None) or max_len / original,
            original_max_len=original,
            attention_factor=fields.take("attention_factor", None),
        )
    elif kind != "default":
        raise ValueError(f"rope_type={kind!r} is not supported.")
    fields.finish()
    return {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rotary_fraction": 1.0 if fraction is None else fraction,
        "max_len": longest,
    }


def _read_fraction(fields: Fields, default: float | None) -> float | None:
    if default is None:
        fields.choose("partial_rotary_factor", {None: 1, 1.0: 1}, None)
        return None
    return fields.take("partial_rotary_factor", default)


def write_rope(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `read_rope`."""
    fields = {"rope_theta": config.rope_theta, "rope_scaling": write_scaling(config.rope_scaling)}
    if config.rotary_fraction != 1:
        fields["partial_rotary_factor"] = config.rotary_fraction
    if isinstance(config.rope_scaling, DynamicScaling):
        fields["max_position_embeddings"] = config.rope_scaling.original_max_len
    return fields


def write_scaling(scaling: Any) -> dict[str, Any] | None:
    """One of our classes as `rope_scaling`."""
    match scaling:
        case None:
            return None
        case LinearScaling():
            kind, fields = "linear", {"factor": scaling.factor}
        case DynamicScaling():
            kind, fields = "dynamic", {"factor": scaling.factor}
        case Llama3Scaling():
            kind = "llama3"
            fields = {
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_len,
            }
        case YaRNScaling():
            kind = "yarn"
            fields = {
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_len,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
                "attention_factor": scaling.attention_factor,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            }
        case LongRoPEScaling():
            kind = "longrope"
            fields = {
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_len,
                "attention_factor": scaling.attention_factor,
            }
        case _:
            raise ValueError(f"{scaling} has no name in transformers.")
    # In our fields, zero means that a magnitude is not given.
    said = {k: v for k, v in fields.items() if v is not None and not ("mscale" in k and v == 0)}
    return {"rope_type": kind, **said}
