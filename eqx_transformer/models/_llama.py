import dataclasses
import math
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import (
    AbstractMask,
    Causal,
    Implementation,
    SlidingWindow,
    dot_product_attention,
)
from ..nn import Attention, Embedding, GatedMLP, KVCache, Linear, RMSNorm, RoPE
from ..stacks import Residual, Stack, TransformerBlock
from ._config import AbstractConfig

_REMAT = {
    "none": None,
    "full": True,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(AbstractConfig):
    """The numbers that make a `Llama`.

    Arguments:

    - `vocab_size`: how many token ids there are.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `num_heads`: how many query heads.
    - `num_kv_heads`: how many key and value heads; `None` for `num_heads`.
    - `head_dim`: size of a head, even; `None` for `d_model / num_heads`.
    - `d_ff`: size inside the MLPs; `None` for `8 / 3 * d_model` rounded up to a multiple of 64.
    - `max_len`: the longest sequence.
    - `rope_theta`: base of the wavelengths of the rotary positions.
    - `norm_eps`: added to the mean square in every norm.
    - `window`: how many positions a query sees, its own included; `None` for all earlier ones.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `use_bias`: whether the projections of attention and MLP have biases.
    - `tie_embeddings`: whether the output head is the embedding.
    - `dropout_rate`: the probability with which an attention weight, and an output of a residual
        branch, is dropped.
    - `logit_soft_cap`: the bound `c` in `c * tanh(logits / c)`; `None` for no bound.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input and the results of matrix products with weights, which takes
        half of the memory at little or no cost in time.
    - `unroll`: how many blocks make one iteration of the loop over depth.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    """

    vocab_size: int
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    max_len: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    window: int | None = None
    qk_norm: bool = False
    use_bias: bool = False
    tie_embeddings: bool = False
    dropout_rate: float = 0.0
    logit_soft_cap: float | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    attention_implementation: Implementation | None = None

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        for name in (
            *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("d_ff", "max_len", "window", "unroll"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"LlamaConfig: {name}={value} must be at least 1.")
        for name in ("rope_theta", "norm_eps", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"LlamaConfig: {name}={value} must be positive and finite.")
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(
                f"LlamaConfig: dropout_rate={self.dropout_rate} must be at least 0 and below 1."
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"LlamaConfig: d_model={self.d_model} is not a multiple of "
                f"num_heads={self.num_heads}; change one, or give head_dim."
            )
        head_dim = self.d_model // self.num_heads if self.head_dim is None else self.head_dim
        if head_dim % 2:
            origin = f" = d_model / num_heads = {self.d_model} / {self.num_heads}"
            raise ValueError(
                f"LlamaConfig: head_dim={head_dim}{origin if self.head_dim is None else ''} must "
                "be even, because rotary positions turn pairs of features; give an even head_dim."
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; every key head must serve as many query heads."
            )
        if self.unroll > self.num_layers:
            raise ValueError(
                f"LlamaConfig: unroll={self.unroll} is more than num_layers={self.num_layers}."
            )


class Llama(eqx.Module):
    """The Llama family of decoder-only language models, for one sequence of tokens.

    Pre-norm blocks with RMSNorm, rotary positions, grouped queries and SwiGLU. Mistral is this with
    a `window`, Qwen 3 with `qk_norm`. (Touvron et al., 2023.)
    """

    config: LlamaConfig = eqx.field(static=True)
    embedding: Embedding
    stack: Stack
    norm: RMSNorm
    head: Linear | None

    def __init__(self, config: LlamaConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.

        Weights have standard deviation `1 / sqrt(fan_in)`; those that write to the residual stream
        are smaller by `1 / sqrt(2 * num_layers)`, so that its variance does not grow with depth.
        """
        embedding_key, stack_key, head_key = jax.random.split(key, 3)
        d_model = config.d_model
        self.config = config
        self.embedding = Embedding(config.vocab_size, d_model, key=embedding_key)
        self.stack = Stack(
            eqx.Partial(_make_block, config),
            config.num_layers,
            remat=_REMAT[config.remat],
            unroll=config.unroll,
            key=stack_key,
        )
        self.norm = RMSNorm(d_model, eps=config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = Linear(d_model, config.vocab_size, key=head_key)

    @jax.named_scope("eqx_transformer.models.Llama")
    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq vocab"]:
        """The logits of the next token at every position.

        Arguments:

        - `tokens`: their ids.
        - `mask`: who may attend to whom besides being causal: padding, packed documents.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given. Leave them out where that is
            what they are.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        self._check_length("seq", tokens.shape[0])
        x = self.embedding(tokens)
        return self._logits(self.stack(x, mask=mask, positions=positions, key=key))

    def init_cache(self, max_len: int | None = None, dtype: DTypeLike | None = None) -> KVCache:
        """An empty cache, with a leading axis for the layers.

        Arguments:

        - `max_len`: how many tokens fit; that of the configuration if not given.
        - `dtype`: what keys and values are stored in; that of the weights if not given.

        Raises:

        - `ValueError` if `max_len` is more than that of the configuration.
        """
        max_len = self.config.max_len if max_len is None else max_len
        self._check_length("the cache's max_len", max_len)
        return self.stack.init_cache(max_len, dtype)

    @jax.named_scope("eqx_transformer.models.Llama.extend")
    @unbatched(tokens="seq")
    def extend(
        self,
        tokens: Int[Array, " seq"],
        cache: KVCache,
        *,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq vocab"], KVCache]:
        """The logits at the next positions of a sequence: prefill, a part of one, or decoding.

        Arguments:

        - `tokens`: the next tokens.
        - `cache`: what `init_cache`, or the last `extend`, returned.
        - `mask`: as in `__call__`, on absolute positions.
        - `length`: how many of the tokens count; the rest is padding, whose logits are meaningless.
            All if not given.

        Returns:

        What `__call__` would give at these positions, and the cache with them added.

        Raises:

        - An error if they do not fit; see `KVCache.append`.
        """
        x, cache = self.stack.extend(self.embedding(tokens), cache, mask=mask, length=length)
        return self._logits(x), cache

    def _logits(self, x: Float[Array, "seq d_model"]) -> Float[Array, "seq vocab"]:
        x = self.norm(x)
        logits = self.embedding.attend(x) if self.head is None else self.head(x)
        cap = self.config.logit_soft_cap
        if cap is None:
            return logits
        wide = logits.astype(accumulation_dtype(logits.dtype))
        return (cap * jnp.tanh(wide / cap)).astype(logits.dtype)

    def _check_length(self, what: str, length: int) -> None:
        if length > self.config.max_len:
            raise ValueError(
                f"Llama: {what}={length} is more than max_len={self.config.max_len}; shorten it, "
                "or raise max_len in the configuration."
            )


def _make_block(config: LlamaConfig, *, key: PRNGKeyArray) -> TransformerBlock:
    attention_key, mlp_key = jax.random.split(key)
    mask: AbstractMask = Causal()
    if config.window is not None:
        mask = mask & SlidingWindow(left=config.window - 1, right=0)
    attention_fn = dot_product_attention
    if config.attention_implementation is not None:
        attention_fn = eqx.Partial(
            dot_product_attention, implementation=config.attention_implementation
        )
    attention = Attention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope=RoPE(theta=config.rope_theta),
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        mask=mask,
        use_bias=config.use_bias,
        dropout_rate=config.dropout_rate,
        attention_fn=attention_fn,
        key=attention_key,
    )
    d_ff = 64 * math.ceil(8 * config.d_model / 3 / 64) if config.d_ff is None else config.d_ff
    mlp = GatedMLP(config.d_model, d_ff, use_bias=config.use_bias, key=mlp_key)
    norms = (RMSNorm(config.d_model, eps=config.norm_eps) for _ in range(2))
    residuals = (Residual(norm, dropout_rate=config.dropout_rate) for norm in norms)
    block = TransformerBlock(attention, mlp, *residuals)
    scale = 1 / math.sqrt(2 * config.num_layers)
    return eqx.tree_at(
        lambda b: (b.attention.o_proj.weight, b.mlp.down_proj.weight),
        block,
        replace_fn=lambda weight: scale * weight,
    )
