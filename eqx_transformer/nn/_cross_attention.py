from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, ScoreMod, dot_product_attention
from ._attention import head_sizes, split_heads
from ._cache_storage import Int8Vectors, as_floats, stored
from ._checks import check_rate
from ._linear import AbstractLinear, Linear
from ._norm import RMSNorm


class Memory(eqx.Module):
    """The projected keys and values of a sequence that others attend to."""

    k: Float[Array, "kv_seq kv_heads head_dim"] | Int8Vectors
    v: Float[Array, "kv_seq kv_heads head_dim"] | Int8Vectors

    def astype(self, dtype: DTypeLike) -> "Memory":
        """The same, stored in another dtype, which may be int8; see `Int8Vectors`."""
        return Memory(*(stored(x, dtype) for x in (self.k, self.v)))


class CrossAttention(eqx.Module):
    """Multi-head attention of one sequence to another.

        q = q_norm(q_proj(x))
        k, v = k_norm(k_proj(memory)), v_proj(memory)           split into heads
        y = o_proj(attention(q, k, v))

    Keys and values depend only on the other sequence: `project` it once, and `attend` for every
    decoded token. Positions in the two sequences are unrelated, so there is no RoPE and no causal
    mask here. (Vaswani et al., 2017, section 3.2.3.)
    """

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    score_mod: ScoreMod | None
    attention_fn: Callable[..., Array]
    inference: bool
    head_dim: int = eqx.field(static=True)
    scale: float | None = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        d_memory: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        score_mod: ScoreMod | None = None,
        scale: float | None = None,
        use_bias: bool = False,
        k_bias: bool | None = None,
        dropout_rate: float = 0.0,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many query heads.
        - `d_memory`: size of the vectors of the other sequence; `d_model` if not given.
        - `num_kv_heads`, `head_dim`, `qk_norm`, `norm_eps`, `score_mod`, `scale`, `use_bias`,
            `k_bias`, `dropout_rate`, `attention_fn`, `dtype`: see `Attention`.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other.
        """
        num_kv_heads, head_dim = head_sizes(
            "CrossAttention", d_model, num_heads, num_kv_heads, head_dim
        )
        check_rate("CrossAttention", "dropout_rate", dropout_rate)
        d_memory = d_model if d_memory is None else d_memory
        k_bias = use_bias if k_bias is None else k_bias
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        keys = jax.random.split(key, 4)
        self.q_proj = Linear(d_model, q_size, use_bias=use_bias, dtype=dtype, key=keys[0])
        self.k_proj = Linear(d_memory, kv_size, use_bias=k_bias, dtype=dtype, key=keys[1])
        self.v_proj = Linear(d_memory, kv_size, use_bias=use_bias, dtype=dtype, key=keys[2])
        self.o_proj = Linear(q_size, d_model, use_bias=use_bias, dtype=dtype, key=keys[3])
        self.q_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.score_mod = score_mod
        self.attention_fn = attention_fn
        self.inference = False
        self.head_dim = head_dim
        self.scale = scale
        self.dropout_rate = dropout_rate

    @jax.named_scope("eqx_transformer.nn.CrossAttention")
    @unbatched(x="seq d_model", memory="kv_seq d_memory")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        memory: Float[Array, "kv_seq d_memory"],
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends from `x` to `memory`. (`attend` takes what `project` returned instead.)

        Arguments:

        - `x`: the sequence that attends.
        - `memory`: the sequence that is attended to.
        - `mask`: who may attend to whom: `Padding(valid)` for a padded memory.
        - `key`: for dropout; needed if there is any, unless `inference` is set.
        """
        return self.attend(x, self.project(memory), mask=mask, key=key)

    @unbatched(memory="kv_seq d_memory")
    def project(self, memory: Float[Array, "kv_seq d_memory"]) -> Memory:
        """The keys and values of a sequence."""
        k, v = (split_heads(p(memory), self.head_dim) for p in (self.k_proj, self.v_proj))
        return Memory(k if self.k_norm is None else self.k_norm(k), v)

    @unbatched(x="seq d_model")
    def attend(
        self,
        x: Float[Array, "seq d_model"],
        memory: Memory,
        *,
        mask: AbstractMask | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends from `x` to what `project` returned; see `__call__`.

        Keys and values may be stored in another dtype than that of `x`.
        """
        dropout_rate = 0.0 if self.inference else self.dropout_rate
        if dropout_rate > 0 and key is None:
            raise RuntimeError(
                f"CrossAttention: dropout_rate={dropout_rate} needs a key; pass key=, or switch "
                "dropout off with eqx.nn.inference_mode(model)."
            )
        q = split_heads(self.q_proj(x), self.head_dim)
        out = self.attention_fn(
            q if self.q_norm is None else self.q_norm(q),
            as_floats(memory.k, x.dtype),
            as_floats(memory.v, x.dtype),
            mask=mask,
            score_mod=self.score_mod,
            scale=self.scale,
            dropout_rate=dropout_rate,
            dropout_key=key if dropout_rate > 0 else None,
        )
        return self.o_proj(jax.lax.collapse(out, 1))
