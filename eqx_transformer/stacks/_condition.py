from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import Modulation, TokenSpec, modulate
from ._residual import Branch


class Condition(eqx.Module):
    """What self-attention blocks can be given besides the sequence, as their `context`.

    Arguments:

    - `coordinates`: where its positions are in space, for attention with an `AxialRoPE`.
    - `vector`: the vector that modulates the branches, in blocks with a `Modulation`.
    - `tokens`: the groups of the sequence, for `MixedAttention`.
    """

    coordinates: Float[Array, "seq dims"] | None = None
    vector: Float[Array, " d_condition"] | None = None
    tokens: tuple[TokenSpec, ...] | None = eqx.field(static=True, default=None)


def read_condition(
    owner: str, context: Any, modulation: Modulation | None
) -> tuple[dict[str, Any], Float[Array, "vectors d_model"] | None]:
    """What a block takes from a context: options for its attention, and vectors to modulate by.

    Raises:

    - `ValueError` if the block has no use for something that is given, or something is missing.
    """
    if context is not None and not isinstance(context, Condition):
        raise ValueError(
            f"{owner}: there is no use for the context that was given, a "
            f"{type(context).__name__}; leave it out, give a Condition, or use blocks that attend "
            "to one, such as DecoderBlock."
        )
    coordinates = None if context is None else context.coordinates
    vector = None if context is None else context.vector
    if (vector is None) != (modulation is None):
        raise ValueError(
            f"{owner}: the context has a vector, but the block has no modulation; leave it out, or "
            "build the block with one."
            if modulation is None
            else f"{owner}: the block has a modulation, so it must be called with "
            "context=Condition(vector=...)."
        )
    options = {"coordinates": coordinates, "tokens": None if context is None else context.tokens}
    options = {name: value for name, value in options.items() if value is not None}
    if modulation is None or vector is None:
        return options, None
    return options, modulation(vector)


def modulated(branch: Branch, vectors: Float[Array, "3 d_model"] | None) -> Branch:
    """The branch with its input shifted and scaled and its output gated; unchanged without vectors.

    `vectors` are the shift, the scale and the gate.
    """
    if vectors is None:
        return branch

    def with_gate(h: Array, key: PRNGKeyArray | None) -> tuple[Array, Any]:
        shift, scale, gate = vectors
        h, aux = branch(modulate(h, shift, scale), key)
        return h * gate.astype(h.dtype)[None, :], aux

    return with_gate
