import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray


class Embedding(eqx.Module):
    """One learned vector for every token id.

    An id outside `0..vocab_size-1`, a negative one too, gives a row of NaN: it cannot be mistaken
    for a result, and costs nothing to detect. Give padding a valid id and mask it.
    """

    weight: Float[Array, "vocab_size d_model"]

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        init: jax.nn.initializers.Initializer | None = None,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `vocab_size`: how many ids there are.
        - `d_model`: size of the vectors.
        - `init`: the initialiser `(key, shape, dtype) -> weight`; if not given, a truncated normal
            distribution of standard deviation `1 / sqrt(d_model)`, for which `attend` maps
            normalised vectors to scores of variance one.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weight.
        """
        for name, size in (("vocab_size", vocab_size), ("d_model", d_model)):
            if size < 1:
                raise ValueError(f"Embedding: {name}={size} must be at least 1.")
        if init is None:
            init = jax.nn.initializers.variance_scaling(
                1.0, "fan_in", "truncated_normal", in_axis=1, out_axis=0
            )
        dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
        self.weight = init(key, (vocab_size, d_model), dtype)

    def __call__(
        self, tokens: Int[Array, "*batch"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch d_model"]:
        """The vectors of `tokens`, in the dtype of the weight. `key` is ignored, as in Equinox."""
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"Embedding: tokens have dtype {tokens.dtype} but must be integer ids; use "
                "tokens.astype(jnp.int32)."
            )
        return self.weight.at[tokens].get(
            mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
        )

    def attend(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch vocab_size"]:
        """The inner product of `x` with every token's vector: an output head with tied weights."""
        # Contracts the last axes directly; the table is never transposed.
        return jnp.einsum("...d,vd->...v", x, self.weight.astype(x.dtype))
