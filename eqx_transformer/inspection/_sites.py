"""The named places in a layer, and wrappers that record or change values there."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from ..attention import AbstractMask, attention_weights
from ..nn import (
    MLP,
    AbstractAttention,
    AbstractLinear,
    Attention,
    CrossAttention,
    DisentangledAttention,
    GatedMLP,
    LatentAttention,
    MixtureOfExperts,
)
from ..stacks import AbstractBlock, BlockSequence

Tree = TypeVar("Tree")

Site = Literal[
    "input",
    "output",
    "attention",
    "queries",
    "keys",
    "values",
    "weights",
    "heads",
    "cross_attention",
    "cross_queries",
    "cross_keys",
    "cross_values",
    "cross_weights",
    "cross_heads",
    "mlp",
    "neurons",
    "router",
]
"""An intermediate value of every layer.

- `"input"`, `"output"`: the input and the output of a block, the residual stream;
    `[seq, d_model]`.
- `"attention"`: the output of self-attention, projected; `[seq, d_model]`.
- `"queries"`, `"keys"`: as they are compared, normalised and rotated; `[seq, heads, head_dim]`,
    `[seq, kv_heads, head_dim]`.
- `"values"`: `[seq, kv_heads, v_dim]`.
- `"weights"`: the weights of softmax attention, before dropout; `[heads, seq, seq]`.
- `"heads"`: the output of each head, not yet projected; `[seq, heads, v_dim]`.
- `"mlp"`: the output of the MLP, or of the mixture of experts; `[seq, d_model]`.
- `"neurons"`: the input of the last map of the MLP, not within experts; `[seq, d_ff]`.
- `"router"`: the logits of the experts; `[seq, num_experts]`.

With the prefix `cross_`, those of attention are of the attention to another sequence.
"""


class Edit(eqx.Module):
    """A function applied to the value at a site.

    One that returns the very object it was given only observes: nothing is computed differently.
    """

    site: str = eqx.field(static=True)
    function: Callable[..., Any]
    rows: tuple[Any, ...] = ()

    def __call__(self, value: Array) -> Array:
        new = self.function(value, *self.rows)
        if new is value:
            return value
        new = jnp.asarray(new)
        if new.shape != value.shape or new.dtype != value.dtype:
            raise ValueError(
                f"patched: the function for {self.site!r} must keep shape and dtype, "
                f"{value.dtype}{list(value.shape)}, but returned {new.dtype}{list(new.shape)}."
            )
        return new


def _apply(edits: tuple[Edit, ...], site: str, value: Array) -> Array:
    for edit in edits:
        if edit.site.removeprefix("cross_") == site:
            value = edit(value)
    return value


class _AttentionFn(eqx.Module):
    """An attention function whose arguments and results are edited."""

    base: Callable[..., Array]
    edits: tuple[Edit, ...]

    needs_heads: ClassVar[bool] = True
    """Whether a layer must compute the queries, keys and values of heads even where it need not;
    see `LatentAttention.extend`."""

    def __call__(self, q: Array, k: Array, v: Array, **options: Any) -> Array:
        q = _apply(self.edits, "queries", q)
        k = _apply(self.edits, "keys", k)
        v = _apply(self.edits, "values", v)
        out = None
        if any(edit.site.endswith("weights") for edit in self.edits):
            names = ("mask", "score_mod", "scale", "q_positions", "kv_positions", "sinks")
            asked = {name: options[name] for name in names if name in options}
            weights = attention_weights(q, k, **asked)
            new = _apply(self.edits, "weights", weights)
            if new is not weights:
                _check_no_dropout(options.get("dropout_rate", 0.0))
                out = _mean(new, v)
        if out is None:
            out = self.base(q, k, v, **options)
        return _apply(self.edits, "heads", out)


class _Projection(eqx.Module):
    """A linear map whose input or output is edited.

    It is not an `AbstractLinear` itself: adapters go on the map inside, so edits are not merged.
    """

    base: AbstractLinear
    edits: tuple[Edit, ...]

    @property
    def weight(self) -> Float[Array, "*stack in_features out_features"]:
        return self.base.weight

    @property
    def bias(self) -> Float[Array, "*stack out_features"] | None:
        return self.base.bias

    def __call__(
        self, x: Float[Array, "*batch in_features"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "*batch out_features"]:
        y = self.base(_apply(self.edits, "neurons", x), key=key)
        for site in ("attention", "router"):
            y = _apply(self.edits, site, y)
        return y


class _MLP(eqx.Module):
    """An MLP or a mixture of experts whose output is edited."""

    base: Callable[..., Array]
    edits: tuple[Edit, ...]

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        return self.apply_with_stats(x, key=key)[0]

    def apply_with_stats(self, x: Array, *, key: PRNGKeyArray | None = None) -> tuple[Array, Any]:
        apply, stats = getattr(self.base, "apply_with_stats", None), None
        if apply is None:
            y = self.base(x, key=key)
        else:
            y, stats = apply(x, key=key)
        return _apply(self.edits, "mlp", y), stats


class _Block(AbstractBlock):
    """A block whose input or output is edited."""

    base: Any
    edits: tuple[Edit, ...]

    @property
    def attention(self) -> Any:
        """For code that reaches into the blocks of a stack, to share a bias."""
        return self.base.attention

    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        x = _apply(self.edits, "input", x)
        x = self.base(x, context=context, mask=mask, positions=positions, key=key)
        return _apply(self.edits, "output", x)

    def apply_with_stats(self, x: Array, **options: Any) -> tuple[Array, Any]:
        apply, stats = getattr(self.base, "apply_with_stats", None), None
        x = _apply(self.edits, "input", x)
        if apply is None:
            x = self.base(x, **options)
        else:
            x, stats = apply(x, **options)
        return _apply(self.edits, "output", x), stats

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        return self.base.init_cache(max_len, dtype, context=context)

    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        x = _apply(self.edits, "input", x)
        x, cache = self.base.extend(x, cache, context=context, mask=mask, length=length)
        return _apply(self.edits, "output", x), cache


class _Where(NamedTuple):
    """How a site is found."""

    within: tuple[type, ...]
    """Classes of modules that have it."""
    outside: tuple[type, ...]
    """Classes of modules that are not searched for those."""
    field: str | None
    """The field whose value is wrapped; `None` for the module itself."""
    wrapper: type[Any]


_SELF = (Attention, LatentAttention, DisentangledAttention)
_BLOCK = _Where((AbstractBlock,), (), None, _Block)
_OF_SELF = _Where(_SELF, (), "attention_fn", _AttentionFn)
_OF_CROSS = _Where((CrossAttention,), (), "attention_fn", _AttentionFn)
_WHERE: Final[dict[str, _Where]] = {
    "input": _BLOCK,
    "output": _BLOCK,
    "attention": _Where((AbstractAttention,), (), "o_proj", _Projection),
    **dict.fromkeys(("queries", "keys", "values", "weights", "heads"), _OF_SELF),
    "cross_attention": _Where((CrossAttention,), (), "o_proj", _Projection),
    **dict.fromkeys([s for s in get_args(Site) if s.startswith("cross_")][1:], _OF_CROSS),
    "mlp": _Where((AbstractBlock,), (), "mlp", _MLP),
    "neurons": _Where((MLP, GatedMLP), (MixtureOfExperts,), "down_proj", _Projection),
    "router": _Where((MixtureOfExperts,), (), "router", _Projection),
}


def check_site(owner: str, site: str) -> None:
    """Checks the name of a site."""
    if site not in _WHERE:
        raise ValueError(f"{owner}: there is no {site!r}; there are {', '.join(_WHERE)}.")


def count(tree: Any, site: str) -> int:
    """How many values have this name, in a block or a stack of blocks."""
    return len(_found(tree, site))


def insert(tree: Tree, site: str, edits: Sequence[Edit]) -> Tree:
    """The block with an edit for every value that has this name, in order."""
    wrapper = _WHERE[site].wrapper
    new = []
    for base, edit in zip(_found(tree, site), edits, strict=True):
        before: tuple[Edit, ...] = ()
        if isinstance(base, wrapper):
            # In one wrapper, not nested: otherwise edits of inputs would apply in the opposite
            # order to edits of outputs.
            base, before = base.base, base.edits
        new.append(wrapper(base, (*before, edit)))
    return eqx.tree_at(lambda tree: _found(tree, site), tree, new)


def _found(tree: Any, site: str) -> list[Any]:
    within, outside, field, _ = _WHERE[site]

    def has_site(x: Any) -> bool:
        if not isinstance(x, within) or isinstance(x, BlockSequence):
            return False
        return field is None or field in x.__dataclass_fields__

    def is_leaf(x: Any) -> bool:
        return isinstance(x, outside) or has_site(x)

    found = [x for x in jax.tree.leaves(tree, is_leaf=is_leaf) if has_site(x)]
    return found if field is None else [getattr(x, field) for x in found]


def _check_no_dropout(rate: float) -> None:
    if rate > 0:
        raise ValueError(
            f"patched: weights are edited, but dropout_rate={rate} would drop some of them; switch "
            "dropout off with eqx.nn.inference_mode(model)."
        )


def _mean(
    weights: Float[Array, "heads q_seq kv_seq"], v: Float[Array, "kv_seq kv_heads v_dim"]
) -> Float[Array, "q_seq heads v_dim"]:
    """The mean of the values, with these weights."""
    heads, q_seq, kv_seq = weights.shape
    dtype = accumulation_dtype(v.dtype)
    grouped = weights.reshape(v.shape[1], -1, q_seq, kv_seq).astype(dtype)
    out = jnp.einsum("hgqk,khd->qhgd", grouped, v.astype(dtype))
    return out.reshape(q_seq, heads, -1).astype(v.dtype)
