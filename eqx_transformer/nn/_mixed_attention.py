"""Attention between named groups of tokens."""

import collections
from collections.abc import Callable, Sequence
from typing import Final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask, Padding, TokenGroups, dot_product_attention
from ._attention import AbstractAttention, head_sizes, split_heads
from ._axial_rope import AxialRoPE
from ._checks import check_rate
from ._linear import AbstractLinear, Linear
from ._norm import RMSNorm
from ._padding import padding_flags
from ._token_groups import AttentionPattern, TokenSpec, check_patterns, check_tokens

FEW_SCORES: Final = 2**12
"""Up to this many scores (`q_seq * kv_seq`), one masked call is no slower on CPU than several."""


class GroupMemory(eqx.Module):
    """Rotated keys, and values, of one group, and which of its tokens are not padding."""

    k: Float[Array, "size kv_heads head_dim"]
    v: Float[Array, "size kv_heads head_dim"]
    valid: Bool[Array, " size"] | None


class GroupCache(eqx.Module):
    """Keys and values of groups by name, stored in `dtype`."""

    groups: dict[str, GroupMemory]
    dtype: DTypeLike = eqx.field(static=True)


class MixedAttention(AbstractAttention):
    """Multi-head attention of groups of tokens to groups of tokens.

        q, k, v = q_proj(x), k_proj(x), v_proj(x)               split into heads
        q, k = rope(q_norm(q)), rope(k_norm(k))                 where given
        h[pattern.query_tokens] = attention(q[pattern.query_tokens],
                                            k[pattern.key_value_tokens],
                                            v[pattern.key_value_tokens])    for every pattern
        y = o_proj(h)

    What no pattern allows is not computed. Patterns with the same keys become one call, and those
    of equal shape one batched call. If there would still be more than one, and scores are few
    (`q_seq * kv_seq <= FEW_SCORES`), one call with a `TokenGroups` mask over all tokens is used
    instead, with the same result. The order of tokens within a group does not matter.

    With anchors, as `self_patterns`, `cross_patterns` and `joint_patterns` make them, the cost is
    linear in the number of queries, and `extend` takes them in any number of chunks. (Alkin et al.,
    AB-UPT: Scaling Neural CFD Surrogates, 2025.)
    """

    q_proj: AbstractLinear
    k_proj: AbstractLinear
    v_proj: AbstractLinear
    o_proj: AbstractLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    rope: AxialRoPE | None
    attention_fn: Callable[..., Array]
    inference: bool
    patterns: tuple[AttentionPattern, ...] = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)
    dropout_rate: float = eqx.field(static=True)
    as_mask: bool | None = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        patterns: Sequence[AttentionPattern],
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: AxialRoPE | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        as_mask: bool | None = None,
        attention_fn: Callable[..., Array] = dot_product_attention,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_heads`: how many query heads.
        - `patterns`: which groups attend to which. Every group of an input must be a query in
            exactly one of them.
        - `rope`: rotary positions; every call must then be given `coordinates`.
        - `as_mask`: whether patterns are computed as one call with a mask, or as one call for each
            shape; chosen as described above if not given.
        - `num_kv_heads`, `head_dim`, `qk_norm`, `norm_eps`, `use_bias`, `dropout_rate`,
            `attention_fn`, `dtype`: see `Attention`.
        - `key`: for the initial weights.

        Raises:

        - `ValueError` for sizes that do not divide each other, or patterns that contradict each
            other.
        """
        check_patterns("MixedAttention", patterns)
        num_kv_heads, head_dim = head_sizes(
            "MixedAttention", d_model, num_heads, num_kv_heads, head_dim
        )
        check_rate("MixedAttention", "dropout_rate", dropout_rate)
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        keys = jax.random.split(key, 4)
        self.q_proj = Linear(d_model, q_size, use_bias=use_bias, dtype=dtype, key=keys[0])
        self.k_proj = Linear(d_model, kv_size, use_bias=use_bias, dtype=dtype, key=keys[1])
        self.v_proj = Linear(d_model, kv_size, use_bias=use_bias, dtype=dtype, key=keys[2])
        self.o_proj = Linear(q_size, d_model, use_bias=use_bias, dtype=dtype, key=keys[3])
        self.q_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps, dtype=dtype) if qk_norm else None
        self.rope = rope
        self.attention_fn = attention_fn
        self.inference = False
        self.patterns = tuple(patterns)
        self.head_dim = head_dim
        self.dropout_rate = dropout_rate
        self.as_mask = as_mask

    @jax.named_scope("eqx_transformer.nn.MixedAttention")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        tokens: Sequence[TokenSpec] = (),
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        coordinates: Float[Array, "seq dims"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Attends within one input, which contains every group that is attended to.

        Arguments:

        - `x`: the tokens, group by group.
        - `tokens`: the groups, in this order.
        - `mask`: `Padding(valid)` where some tokens are padding; the rest is up to `patterns`.
        - `positions`: must not be given; tokens may have coordinates, but have no order.
        - `coordinates`: where the tokens are in space, for an `AxialRoPE`.
        - `key`: for dropout; needed if there is any, unless `inference` is set.

        Raises:

        - `ValueError` if sizes do not add up, or a group is attended to but missing, or attends to
            nothing.
        """
        self._check_positions(positions)
        return self._attend(x, tokens, {}, mask, coordinates, key)[0]

    def init_cache(self, max_len: int = 0, dtype: DTypeLike | None = None) -> GroupCache:
        """A cache without groups, which will store them in `dtype` or that of the weights.

        Groups are stored at their own size, so `max_len` makes no difference.

        Raises:

        - `ValueError` for a dtype that is not floating.
        """
        dtype = self.k_proj.weight.dtype if dtype is None else jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"MixedAttention: dtype={dtype} must be floating; only groups that are attended to "
                "are cached, once and not token by token."
            )
        return GroupCache({}, dtype)

    @jax.named_scope("eqx_transformer.nn.MixedAttention.extend")
    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: GroupCache,
        *,
        tokens: Sequence[TokenSpec] = (),
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
        coordinates: Float[Array, "seq dims"] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], GroupCache]:
        """Attends from some groups to each other and to those in a cache.

        First pass the anchors with an empty cache, then the queries in any number of calls, with
        `TokenSpec(anchors, None)` among the `tokens`, which says that the anchors are cached.

        Arguments:

        - `cache`: the keys and values of groups that are not in `x`.
        - `length`: must not be given; `Padding` says what is padding.
        - `x`, `tokens`, `mask`, `coordinates`: as in `__call__`.

        Returns:

        What `__call__` would give for these tokens, and the cache with those groups of `x` added
        that some pattern attends to.

        Raises:

        - `ValueError` like `__call__`, and for groups that are both in the cache and in the input.
        """
        self._check_positions(length)
        out, new = self._attend(x, tokens, cache.groups, mask, coordinates, None)
        # Returned as it is where nothing is added, so that stacks need not copy it.
        if not new:
            return out, cache
        new = jax.tree.map(lambda a: a.astype(cache.dtype) if eqx.is_inexact_array(a) else a, new)
        return out, GroupCache({**cache.groups, **new}, cache.dtype)

    def _check_positions(self, given: Int[Array, "..."] | int | None) -> None:
        if given is not None:
            raise ValueError(
                "MixedAttention: tokens of a group have no order, so there are no positions and "
                "no length; give coordinates, and mask=Padding(valid) for padding."
            )

    def _attend(
        self,
        x: Array,
        tokens: Sequence[TokenSpec],
        cached: dict[str, GroupMemory],
        mask: AbstractMask | None,
        coordinates: Array | None,
        key: PRNGKeyArray | None,
    ) -> tuple[Array, dict[str, GroupMemory]]:
        """The output, and keys and values of those groups of the input that are attended to."""
        check_tokens("MixedAttention", tokens, self.patterns, x.shape[0], tuple(cached))
        valid = padding_flags("MixedAttention", mask, x.shape[0])
        if valid is not None:
            # NaN in padding must not reach a gradient either, through a product with zero.
            x = jnp.where(valid[:, None], x, 0)
            if coordinates is not None:
                coordinates = jnp.where(valid[:, None], coordinates, 0)
        if not self.inference and self.dropout_rate > 0 and key is None:
            raise RuntimeError(
                f"MixedAttention: dropout_rate={self.dropout_rate} needs a key; pass key=, or "
                "switch dropout off with eqx.nn.inference_mode(model)."
            )
        q, k, v = self._project(x, coordinates)
        queries: dict[str, Array] = {}
        memory = {
            name: GroupMemory(group.k.astype(x.dtype), group.v.astype(x.dtype), group.valid)
            for name, group in cached.items()
        }
        new: dict[str, GroupMemory] = {}
        read = {name for pattern in self.patterns for name in pattern.key_value_tokens}
        start = 0
        for spec in tokens:
            if spec.size is not None:
                rows = slice(start, start + spec.size)
                start += spec.size
                queries[spec.name] = q[rows]
                if spec.name in read:
                    new[spec.name] = GroupMemory(
                        k[rows], v[rows], None if valid is None else valid[rows]
                    )
        memory |= new
        calls = _merged(self.patterns, tuple(queries))
        kv_seq = sum(memory[name].k.shape[0] for name in {n for _, kv in calls for n in kv})
        as_mask = self.as_mask
        if as_mask is None:
            as_mask = len(calls) > 1 and x.shape[0] * kv_seq <= FEW_SCORES
        compute = self._as_one_call if as_mask else self._as_calls
        out = compute(queries, memory, calls, key)
        # Some group, perhaps all of them, may have no tokens.
        rows = [out[spec.name] for spec in tokens if spec.size is not None]
        out = jnp.concatenate(rows) if rows else q
        return self.o_proj(jax.lax.collapse(out, 1)), new

    def _project(self, x: Array, coordinates: Array | None) -> tuple[Array, Array, Array]:
        if (coordinates is None) != (self.rope is None):
            raise ValueError(
                "MixedAttention: there are coordinates, but no AxialRoPE to make use of them; "
                "leave them out, or build the layer with rope=AxialRoPE(...)."
                if self.rope is None
                else "MixedAttention: rope is an AxialRoPE, so coordinates must be given: in a "
                "stack, by context=Condition(coordinates=...)."
            )
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (split_heads(p(x), self.head_dim) for p in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None and coordinates is not None:
            q, k = self.rope(q, coordinates), self.rope(k, coordinates)
        return q, k, v

    def _call(
        self,
        q: Array,
        memory: GroupMemory,
        key: PRNGKeyArray | None,
        mask: AbstractMask | None = None,
        q_positions: Array | None = None,
    ) -> Array:
        if memory.valid is not None:
            padding = Padding(memory.valid)
            mask = padding if mask is None else mask & padding
        rate = 0.0 if self.inference else self.dropout_rate
        return self.attention_fn(
            q,
            memory.k,
            memory.v,
            mask=mask,
            q_positions=q_positions,
            dropout_rate=rate,
            dropout_key=key if rate > 0 else None,
        )

    def _as_calls(
        self,
        queries: dict[str, Array],
        memory: dict[str, GroupMemory],
        calls: list[tuple[tuple[str, ...], tuple[str, ...]]],
        key: PRNGKeyArray | None,
    ) -> dict[str, Array]:
        """One call for every distinct shape of patterns, over all patterns of that shape."""
        padded = any(memory[name].valid is not None for _, kv in calls for name in kv)
        shapes: dict[tuple[int, int], list[tuple[tuple[str, ...], Array, GroupMemory]]]
        shapes = collections.defaultdict(list)
        for names, kv in calls:
            q = jnp.concatenate([queries[name] for name in names])
            together = _joined([memory[name] for name in kv], padded)
            shapes[q.shape[0], together.k.shape[0]].append((names, q, together))
        out: dict[str, Array] = {}
        for i, same in enumerate(shapes.values()):
            key_of_shape = None if key is None else jax.random.fold_in(key, i)
            if len(same) == 1:
                [(names, q, together)] = same
                results = [self._call(q, together, key_of_shape)]
            else:
                names, q, together = zip(*same, strict=True)
                q, together = jax.tree.map(lambda *x: jnp.stack(x), *zip(q, together, strict=True))
                keys = None if key_of_shape is None else jax.random.split(key_of_shape, len(same))
                results = list(jax.vmap(self._call)(q, together, keys))
            for (names, _, _), result in zip(same, results, strict=True):
                out |= _parted(result, names, queries)
        return out

    def _as_one_call(
        self,
        queries: dict[str, Array],
        memory: dict[str, GroupMemory],
        calls: list[tuple[tuple[str, ...], tuple[str, ...]]],
        key: PRNGKeyArray | None,
    ) -> dict[str, Array]:
        """One call over all groups, with a mask."""
        # Groups that are attended to come first: then keys are at positions 0, 1, 2, ...
        read = tuple(dict.fromkeys(name for _, kv in calls for name in kv))
        order = read + tuple(name for name in queries if name not in read)
        sizes = [len(memory[n].k if n in read else queries[n]) for n in order]
        reads = {name: kv for names, kv in calls for name in names}
        attends = [[other in reads.get(name, ()) for other in order] for name in order]
        names = tuple(name for name in order if name in queries)
        positions = None
        if names != order:
            starts = dict(zip(order, (sum(sizes[:i]) for i in range(len(order))), strict=True))
            each = [starts[n] + jnp.arange(len(queries[n]), dtype=jnp.int32) for n in names]
            positions = jnp.concatenate(each)
        padded = any(memory[name].valid is not None for name in read)
        q = jnp.concatenate([queries[name] for name in names])
        together = _joined([memory[name] for name in read], padded)
        result = self._call(q, together, key, TokenGroups(sizes, attends), positions)
        return _parted(result, names, queries)


def _merged(
    patterns: Sequence[AttentionPattern], present: Sequence[str]
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Queries and keys of every call: groups that attend to the same keys are merged."""
    queries: dict[frozenset[str], list[str]] = collections.defaultdict(list)
    keys: dict[frozenset[str], tuple[str, ...]] = {}
    for pattern in patterns:
        names = [name for name in pattern.query_tokens if name in present]
        if names:
            kv = frozenset(pattern.key_value_tokens)
            queries[kv] += names
            keys.setdefault(kv, tuple(pattern.key_value_tokens))
    return [(tuple(names), keys[kv]) for kv, names in queries.items()]


def _joined(groups: list[GroupMemory], padded: bool) -> GroupMemory:
    valid = None
    if padded:
        flags = [jnp.ones(len(g.k), bool) if g.valid is None else g.valid for g in groups]
        valid = jnp.concatenate(flags)
    k, v = (jnp.concatenate(x) for x in ([g.k for g in groups], [g.v for g in groups]))
    return GroupMemory(k, v, valid)


def _parted(out: Array, names: Sequence[str], queries: dict[str, Array]) -> dict[str, Array]:
    parts: dict[str, Array] = {}
    start = 0
    for name in names:
        parts[name] = out[start : start + len(queries[name])]
        start += len(queries[name])
    return parts
