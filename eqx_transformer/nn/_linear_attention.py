import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask, FeatureMap, elu_plus_one, linear_attention
from ..attention._linear import (
    LinearState,
    at_positions,
    extend_linear_attention,
    is_causal,
    num_features,
)
from ._attention import AbstractAttention, head_sizes, split_heads
from ._linear import AbstractLinear, Linear
from ._norm import RMSNorm
from ._rope import RoPE


class LinearAttentionCache(eqx.Module):
    """What one linear attention layer keeps of a sequence, as a value of constant size.

    A search may fork it, but positions cannot be taken back: the state is a sum over all of them.

    `max_len` is how many positions may be added; it takes no memory.
    """

    state: LinearState
    length: Int[Array, ""]
    max_len: int = eqx.field(static=True)

    def truncate(self, length: int | Int[Array, ""]) -> "LinearAttentionCache":
        """Raises an error; see `eqx_transformer.nn.truncate`."""
        raise ValueError(
            "LinearAttentionCache: positions cannot be taken back, because the state is a sum over "
            "all of them; keep the cache from before they were added."
        )


class LinearAttention(AbstractAttention):
    """Multi-head self-attention with a kernel in place of the softmax.

        q, k, v = q_proj(x), k_proj(x), v_proj(x)              split into heads
        q, k = rope(q_norm(q)), rope(k_norm(k))                 where given
        y = o_proj(linear_attention(q, k, v))

    Time is linear in the sequence, and the cache of a causal layer has a constant size: it is
    `sum_j phi(k[j]) v[j]^T` and `sum_j phi(k[j])`. (Katharopoulos et al., Transformers are RNNs,
    2020, section 3.4.)

    Queries and keys are rotated before the feature map, as in `Attention`: all weights stay
    positive and are normalised by their sum. With `RandomFeatures` the layer then estimates
    `Attention` with the same `rope`; with another feature map, weights depend on more than
    distances. Rotating the features instead (Su et al., 2021, equation 19) could make weights
    negative.
    """

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    rope: RoPE | None
    mask: AbstractMask | None
    feature_map: FeatureMap
    head_dim: int = eqx.field(static=True)
    chunk_size: int = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: RoPE | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        mask: AbstractMask | None = None,
        feature_map: FeatureMap = elu_plus_one,
        chunk_size: int = 64,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many query heads.
        - `num_kv_heads`, `head_dim`, `rope`, `qk_norm`, `norm_eps`: see `Attention`.
        - `mask`: what the architecture imposes; `Causal()` makes a decoder, with a cache. See
            `linear_attention` for which masks there may be.
        - `feature_map`: `phi`; the leaves of a Module are trained with the layer.
        - `chunk_size`: how many positions are computed densely at a time. It affects only speed.
        - `use_bias`: whether the four projections have biases.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other, or are not positive.
        """
        num_kv_heads, head_dim = head_sizes(
            "LinearAttention", d_model, num_heads, num_kv_heads, head_dim
        )
        if chunk_size < 1:
            raise ValueError(f"LinearAttention: chunk_size={chunk_size} must be at least 1.")
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        keys = jax.random.split(key, 4)
        self.q_proj = Linear(d_model, q_size, use_bias=use_bias, dtype=dtype, key=keys[0])
        self.k_proj = Linear(d_model, kv_size, use_bias=use_bias, dtype=dtype, key=keys[1])
        self.v_proj = Linear(d_model, kv_size, use_bias=use_bias, dtype=dtype, key=keys[2])
        self.o_proj = Linear(q_size, d_model, use_bias=use_bias, dtype=dtype, key=keys[3])
        self.q_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.rope = rope
        self.mask = mask
        self.feature_map = feature_map
        self.head_dim = head_dim
        self.chunk_size = chunk_size

    @jax.named_scope("eqx_transformer.nn.LinearAttention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one sequence.

        Arguments:

        - `x`: the sequence.
        - `mask`: who may attend to whom, combined by `&` with the layer's own mask: `Padding`, one
            `Segments` in order, `Causal()`, any `&` of them.
        - `positions`: absolute positions, for `rope` and masks; `0, 1, 2, ...` if not given. With a
            causal mask they must increase.
        - `key`: ignored, there is no dropout.

        Raises:

        - What `linear_attention` raises, and an error, at run time under `jax.jit`, if positions
            do not increase.
        """
        mask = self._combined(mask)
        if positions is not None and mask is not None:
            mask = at_positions(mask, positions)
            if is_causal(mask):
                x = eqx.error_if(
                    x,
                    jnp.any(positions[1:] <= positions[:-1]),
                    "LinearAttention: with a causal mask positions must increase along the "
                    "sequence. Sort it, or use Attention.",
                )
        q, k, v = self._project(x, positions)
        out = linear_attention(
            q, k, v, mask=mask, feature_map=self.feature_map, chunk_size=self.chunk_size
        )
        return self.o_proj(jax.lax.collapse(out, 1))

    def init_cache(self, max_len: int, dtype: DTypeLike | None = None) -> LinearAttentionCache:
        """An empty cache for up to `max_len` positions, of the same size for any `max_len`.

        It is stored in `dtype`, or that of the weights, but in float32 at least: it holds sums over
        the whole sequence.
        """
        dtype = jnp.dtype(self.k_proj.weight.dtype if dtype is None else dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"LinearAttention: dtype={dtype} must be floating, because the state is a sum over "
                "positions; its size does not grow with them."
            )
        wide = accumulation_dtype(dtype)
        num_kv_heads = self.k_proj.weight.shape[-1] // self.head_dim
        if max_len < 1:
            raise ValueError(f"LinearAttention: max_len={max_len} must be at least 1.")
        features = num_features(self.feature_map, self.head_dim, wide)
        state = LinearState.init(num_kv_heads, features, self.head_dim, wide)
        return LinearAttentionCache(state, jnp.zeros((), jnp.int32), max_len)

    @jax.named_scope("eqx_transformer.nn.LinearAttention.extend")
    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: LinearAttentionCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], LinearAttentionCache]:
        """Attends from the next positions of a sequence to all of it so far.

        Arguments:

        - `x`: the next positions: a prompt, a part of one, or one token.
        - `cache`: what is kept of the earlier ones.
        - `mask`: as in `__call__`, on absolute positions `0..max_len-1`. Whether it hides a key is
            decided when that key is added, and cannot be changed by the mask of a later call.
        - `length`: how many positions of `x` count; the rest is padding, whose output is
            meaningless. All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.

        Raises:

        - `ValueError` if neither the layer nor `mask` is causal, or there are more than `max_len`
            positions in `x`.
        - An error, at run time under `jax.jit`, if they do not fit or there are fewer than
            `length`, or if segments are not in order.
        """
        seq, max_len = x.shape[0], cache.max_len
        if seq > max_len:
            raise ValueError(
                f"LinearAttention: {seq} positions cannot be added to a cache of max_len="
                f"{max_len}; make it with a larger max_len."
            )
        count = jnp.asarray(seq if length is None else length, jnp.int32)
        end = cache.length + count
        x, end = eqx.error_if(
            (x, end),
            (end > max_len) | (count > seq) | (count < 0),
            f"LinearAttention: more positions than max_len={max_len}, or a length outside "
            f"0..{seq}; make the cache with a larger max_len.",
        )
        index = jnp.arange(seq, dtype=jnp.int32)
        positions = cache.length + index
        if length is not None:
            # Padding may be NaN, which would reach the gradients of the projections.
            x = jnp.where((index < count)[:, None], x, 0)
            positions = jnp.where(index < count, positions, -1)
        q, k, v = self._project(x, positions)
        out, state = extend_linear_attention(
            q,
            k,
            v,
            cache.state,
            mask=self._combined(mask),
            positions=positions,
            feature_map=self.feature_map,
            chunk_size=self.chunk_size,
        )
        return self.o_proj(jax.lax.collapse(out, 1)), LinearAttentionCache(state, end, max_len)

    def _combined(self, mask: AbstractMask | None) -> AbstractMask | None:
        if self.mask is None or mask is None:
            return self.mask if mask is None else mask
        return self.mask & mask

    def _project(
        self, x: Float[Array, "seq d_model"], positions: Int[Array, " seq"] | None
    ) -> tuple[Array, Array, Array]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(p(x), self.head_dim) for p in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            if positions is None:
                positions = jnp.arange(x.shape[0], dtype=jnp.int32)
            q, k = self.rope(q, positions), self.rope(k, positions)
        return q, k, v
