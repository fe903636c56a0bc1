"""How the wavelengths of rotary positions change for sequences longer than those of training.

Each is a few numbers and a map from the frequencies of the pairs (radians per position, the fastest
first) to new ones, with a factor on queries and keys. None of them has parameters.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ._checks import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractRoPEScaling(abc.ABC):
    """What `RoPE` takes as `scaling`."""

    needs_length: ClassVar[bool] = False
    """Whether frequencies depend on how long the sequence is."""

    @abc.abstractmethod
    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """The frequencies that replace `frequency`, and the factor on queries and keys.

        Arguments:

        - `frequency`: `theta ** (-i / half)` for every pair `i`.
        - `theta`: base of the wavelengths.
        - `length`: how long the sequence is, if `needs_length`.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling(AbstractRoPEScaling):
    """Positions are divided by `factor`. (Chen et al., Position Interpolation, 2023.)"""

    factor: float | int

    def __post_init__(self) -> None:
        _check_factor(self, self.factor)

    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """See `AbstractRoPEScaling`."""
        return frequency / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicScaling(AbstractRoPEScaling):
    """A base that grows with the length of the sequence, from `original_max_len` on.

        theta' = theta * (factor * length / original_max_len - (factor - 1)) ** (d / (d - 2))

    with `d` rotated features, which divides the lowest frequency by the number in parentheses and
    leaves the highest. All positions of a sequence use its length, so decoding with a cache equals
    the forward pass only up to `original_max_len` positions, or if one call adds them all: in
    earlier, shorter calls the deeper layers saw other angles. ("NTK-aware" scaling, bloc97, 2023;
    Peng et al., YaRN, 2024, appendix B.1 and section 3.3.)
    """

    needs_length: ClassVar[bool] = True
    factor: float | int
    original_max_len: int

    def __post_init__(self) -> None:
        _check_factor(self, self.factor)
        _check_length(self, self.original_max_len)

    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """See `AbstractRoPEScaling`."""
        half = frequency.shape[0]
        if half < 2:
            raise ValueError("DynamicScaling: there must be at least 4 rotated features, not 2.")
        dtype = jnp.result_type(float)
        times = jnp.maximum(jnp.asarray(length, dtype) / self.original_max_len, 1)
        growth = self.factor * times - (self.factor - 1)
        exponent = jnp.asarray(-np.arange(half) / (half - 1), dtype)
        return jnp.asarray(frequency, dtype) * growth**exponent, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling(AbstractRoPEScaling):
    """Long wavelengths are multiplied by `factor`, short ones kept, those between interpolated.

    A wavelength is long if it fits fewer than `low_freq_factor` times into `original_max_len`, and
    short if it fits more than `high_freq_factor` times. (Grattafiori et al., The Llama 3 Herd of
    Models, 2024; as in Meta's code for Llama 3.1.)
    """

    factor: float | int
    low_freq_factor: float | int = 1.0
    high_freq_factor: float | int = 4.0
    original_max_len: int = 8192

    def __post_init__(self) -> None:
        _check_factor(self, self.factor)
        _check_length(self, self.original_max_len)
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"Llama3Scaling: low_freq_factor={self.low_freq_factor} must be positive and less "
                f"than high_freq_factor={self.high_freq_factor}."
            )

    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """See `AbstractRoPEScaling`."""
        turns = self.original_max_len * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        return frequency * (kept + (1 - kept) / self.factor), 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRNScaling(AbstractRoPEScaling):
    """Slow pairs turn `factor` times slower, fast ones as before, with a linear ramp between.

    Fast pairs turn more than `beta_fast` times within `original_max_len` positions, slow pairs
    fewer than `beta_slow` times; the ramp is linear in the index of the pair. Queries
    and keys are multiplied by `attention_factor`, by default `0.1 ln(factor) + 1`. (Peng et al.,
    YaRN, 2024, equations 20 to 23.)

    Arguments:

    - `factor`: how much longer sequences become.
    - `original_max_len`: how long they were in training.
    - `beta_fast`, `beta_slow`: where the ramp begins and ends.
    - `truncate`: whether its ends are rounded outwards to whole pairs.
    - `attention_factor`: on queries and keys.
    - `mscale`, `mscale_all_dim`: with `m(s) = 0.1 s ln(factor) + 1`, the attention factor is
        `m(mscale) / m(mscale_all_dim)` where it is not given, and `LatentAttention` multiplies its
        scores by `m(mscale_all_dim) ** 2` (DeepSeek-V2, 2024). Zero means not given.
    """

    factor: float | int
    original_max_len: int
    beta_fast: float | int = 32.0
    beta_slow: float | int = 1.0
    truncate: bool = True
    attention_factor: float | int | None = None
    mscale: float | int = 0.0
    mscale_all_dim: float | int = 0.0

    def __post_init__(self) -> None:
        _check_factor(self, self.factor)
        _check_length(self, self.original_max_len)
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"YaRNScaling: beta_slow={self.beta_slow} must be positive and less than "
                f"beta_fast={self.beta_fast}."
            )
        if self.attention_factor is not None:
            check_positive(type(self).__name__, "attention_factor", self.attention_factor)
        for name in ("mscale", "mscale_all_dim"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"YaRNScaling: {name}={getattr(self, name)} must be positive and finite, or 0 "
                    "for not given."
                )

    @property
    def score_factor(self) -> float:
        """The factor by which `LatentAttention` multiplies scores."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """See `AbstractRoPEScaling`."""
        half = frequency.shape[0]

        def pair(turns: float | int) -> float:
            """The index of the pair that turns this many times, not rounded."""
            return half * math.log(self.original_max_len / (turns * 2 * math.pi)) / math.log(theta)

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        slow = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        factor = self.attention_factor
        if factor is None and self.mscale and self.mscale_all_dim:
            factor = self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        elif factor is None:
            factor = self._magnitude(1.0)
        return frequency * (1 - slow + slow / self.factor), float(factor)

    def _magnitude(self, scale: float | int) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRoPEScaling(AbstractRoPEScaling):
    """Every wavelength is multiplied by a number of its own, found by search.

    `short_factors` are for sequences of up to `original_max_len`, `long_factors` for all positions
    of longer ones. So decoding with a cache equals the forward pass unless it crosses that length;
    if it does, earlier positions keep what deeper layers computed with the short factors. Give the
    same factors twice where that matters. Queries and keys are multiplied by `attention_factor`, by
    default `sqrt(1 + ln(factor) / ln(original_max_len))`. (Ding et al., LongRoPE, 2024.)

    Arguments:

    - `short_factors`, `long_factors`: one for each rotated pair.
    - `factor`: how much longer sequences become.
    - `original_max_len`: how long they were in training.
    - `attention_factor`: on queries and keys.
    """

    needs_length: ClassVar[bool] = True
    short_factors: tuple[float | int, ...]
    long_factors: tuple[float | int, ...]
    factor: float | int
    original_max_len: int
    attention_factor: float | int | None = None

    def __post_init__(self) -> None:
        _check_factor(self, self.factor)
        _check_length(self, self.original_max_len)
        if self.attention_factor is not None:
            check_positive(type(self).__name__, "attention_factor", self.attention_factor)
        for name in ("short_factors", "long_factors"):
            factors = tuple(float(x) for x in getattr(self, name))
            object.__setattr__(self, name, factors)
            for factor in factors:
                check_positive(type(self).__name__, f"one of {name}", factor)

    def __call__(self, frequency: np.ndarray, theta: float | int, length: Any) -> tuple[Any, float]:
        """See `AbstractRoPEScaling`."""
        for name in ("short_factors", "long_factors"):
            if len(getattr(self, name)) != frequency.shape[0]:
                raise ValueError(
                    f"LongRoPEScaling: there are {len(getattr(self, name))} {name} but "
                    f"{frequency.shape[0]} rotated pairs; there must be one for each."
                )
        short, long = (frequency / np.asarray(f) for f in (self.short_factors, self.long_factors))
        factor = self.attention_factor
        if factor is None:
            factor = math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_len))
        if isinstance(length, int):
            return (long if length > self.original_max_len else short), float(factor)
        dtype = jnp.result_type(float)
        choices = jnp.asarray(long, dtype), jnp.asarray(short, dtype)
        return jnp.where(length > self.original_max_len, *choices), float(factor)


def _check_factor(scaling: AbstractRoPEScaling, factor: float | int) -> None:
    if not 1 <= factor < math.inf:
        raise ValueError(f"{type(scaling).__name__}: factor={factor} must be at least 1.")


def _check_length(scaling: AbstractRoPEScaling, length: int) -> None:
    if length < 2:
        raise ValueError(f"{type(scaling).__name__}: original_max_len={length} must be at least 2.")
