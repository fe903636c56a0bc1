"""Padding, for layers to which the order of tokens does not matter."""

from jaxtyping import Array, Bool

from ..attention import AbstractMask, Padding


def padding_flags(owner: str, mask: AbstractMask | None, seq: int) -> Bool[Array, " seq"] | None:
    """Which tokens are valid, from a mask that can only be `Padding`.

    Raises:

    - `ValueError` for another mask, or one of another length.
    """
    if mask is None:
        return None
    if not isinstance(mask, Padding):
        raise ValueError(f"{owner}: the mask is {mask}, but it can only be Padding(valid).")
    if mask.valid.shape[0] != seq:
        raise ValueError(
            f"{owner}: the padding mask has {mask.valid.shape[0]} flags, but the input {seq} "
            "tokens."
        )
    return mask.valid
