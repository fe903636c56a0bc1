import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray


def apply_dropout(
    owner: str, dropout: eqx.nn.Dropout, x: Float[Array, "..."], key: PRNGKeyArray | None
) -> Float[Array, "..."]:
    """Drops elements; the error if there is no key says what to do."""
    if key is None and dropout.p > 0 and not dropout.inference:
        raise RuntimeError(
            f"{owner}: dropout_rate={dropout.p} needs a key; pass key=, or switch dropout off with "
            "eqx.nn.inference_mode(model)."
        )
    return dropout(x, key=key)
