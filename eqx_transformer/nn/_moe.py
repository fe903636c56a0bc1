import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ._checks import check_positive, check_rate
from ._grouped import grouped_map, sorted_by_group
from ._linear import AbstractLinear, Linear


class RouterStats(eqx.Module):
    """What the router of a `MixtureOfExperts` did with one sequence.

    Everything is in float32 or wider and differentiable where that is meaningful. Choices are
    counted before any is dropped. Padding does not count.

    With `load` and `probability` averaged over a batch, `num_experts * load @ probability` is the
    load-balance loss of the whole batch, which demands less than balance in every sequence.
    """

    load_balance_loss: Float[Array, ""]
    """`num_experts * load @ probability`: 1 if balanced, `num_experts / top_k` at worst. (Fedus et
    al., 2021, equation 4, without its coefficient.)"""
    z_loss: Float[Array, ""]
    """Mean of `logsumexp(logits)**2`. (Zoph et al., 2022, equation 5.)"""
    entropy: Float[Array, ""]
    """Mean entropy of the distribution over experts, in nats: at most `log(num_experts)`."""
    load: Float[Array, " num_experts"]
    """The share of all choices that fell on each expert; sums to 1. No gradient."""
    probability: Float[Array, " num_experts"]
    """Mean over positions of the distribution over experts; sums to 1."""
    dropped: Float[Array, ""]
    """The share of all choices that found their expert full. No gradient."""


class _Routing(eqx.Module):
    """The router's decision for one sequence."""

    logits: Float[Array, "seq num_experts"]
    log_probability: Float[Array, "seq num_experts"]
    experts: Int[Array, "seq top_k"]
    weights: Float[Array, "seq top_k"]


class MixtureOfExperts(eqx.Module):
    """A layer of many experts, of which a router chooses a few for every position.

        logits  = router(x)
        scores  = softmax(logits)  or  sigmoid(logits)
        experts = top_k(scores + selection_bias)              in the best groups, if there are any
        weights = route_scale * scores[experts] / sum(scores[experts])
        y       = sum_i weights[i] * experts[i](x)  +  sigmoid(shared_gate(x)) * shared_experts(x)

    Takes the place of an `MLP`. Only the chosen experts are computed; without a capacity, by
    `experts_fn`. There is no state: losses and loads are returned by `apply_with_stats`. (Shazeer
    et al., 2017; softmax and capacity: Fedus et al., 2021; sigmoid, `selection_bias`, `route_scale`
    and shared experts: DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", equations 12 to 16.)
    """

    router: AbstractLinear
    experts: Callable[[Array], Array]
    shared_experts: Callable[..., Array] | None
    shared_gate: AbstractLinear | None
    selection_bits: Int[Array, " num_experts"] | None
    experts_fn: Callable[..., PyTree]
    inference: bool
    num_experts: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    scores: Literal["softmax", "sigmoid"] = eqx.field(static=True)
    renormalize: bool = eqx.field(static=True)
    route_scale: float = eqx.field(static=True)
    capacity_factor: float | None = eqx.field(static=True)
    jitter: float = eqx.field(static=True)
    num_groups: int = eqx.field(static=True)
    top_groups: int = eqx.field(static=True)
    group_score: Literal["max", "top2"] = eqx.field(static=True)

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        make_expert: Callable[..., Callable[[Array], Array]],
        *,
        top_k: int = 2,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = True,
        route_scale: float = 1.0,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: Literal["max", "top2"] = "max",
        router_bias: bool = False,
        capacity_factor: float | int | None = None,
        shared_experts: Callable[..., Array] | None = None,
        shared_gate: bool = False,
        jitter: float = 0.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_experts`: how many experts.
        - `make_expert`: `make_expert(key=key)` builds one expert, a Module that maps every row of
            `[rows, d_model]` on its own, e.g. `eqx.Partial(GatedMLP, d_model, d_ff)`. It is called
            without a key. Blocks of rows are padded with zeros, where it must be finite.
        - `top_k`: how many experts a position chooses.
        - `scores`: how logits become scores, `"softmax"` over all experts or `"sigmoid"` of each.
        - `renormalize`: whether the weights of a position sum to `route_scale`. With `"softmax"`
            that is the softmax over the chosen logits alone, as in Mixtral. Not with `top_k=1`,
            where the router would get no gradient.
        - `route_scale`: factor on the weights.
        - `selection_bias`: whether every expert has a number, initially zero, that is added to its
            score for the choice, but not to its weight. It has no gradient; see
            `with_selection_bias`.
        - `num_groups`, `top_groups`: experts are in `num_groups` groups of consecutive ones, and a
            position chooses only from its best `top_groups` groups.
        - `group_score`: what makes a group the best: its best expert, `"max"` (DeepSeek-V2), or the
            sum of its best two, `"top2"` (DeepSeek-V3).
        - `router_bias`: whether the router has a bias, a parameter like its weight.
        - `capacity_factor`: how many positions an expert accepts, as a multiple of the mean:
            `ceil(capacity_factor * seq * top_k / num_experts)`. Earlier positions come first, so
            that the result of one does not depend on later ones, only on how many there are. An
            expert adds nothing to positions that it does not accept. `None`: no limit, nothing is
            dropped; only then does a sequence in parts (with a cache) give the same as the whole. A
            batch is then computed as one; if it is spread over devices, see
            `sharding.expert_parallel`.
        - `shared_experts`: a Module that every position goes through as well, such as an `MLP`;
            called as `shared_experts(x, key=key)`.
        - `shared_gate`: whether their output is multiplied by a sigmoid gate, one number per
            position (Qwen1.5-MoE, 2024).
        - `jitter`: the input of the router is multiplied by uniform noise from
            `[1 - jitter, 1 + jitter]`, unless `inference` is set.
        - `dtype`: of the router's parameters; the default floating dtype if not given.
        - `key`: for the initial weights; split once for each expert, so that no two begin alike.

        Raises:

        - `ValueError` for numbers out of range.
        """
        if num_experts < 1:
            raise ValueError(f"MixtureOfExperts: num_experts={num_experts} must be at least 1.")
        if not 1 <= top_k <= num_experts:
            raise ValueError(
                f"MixtureOfExperts: top_k={top_k} must be at least 1 and at most "
                f"num_experts={num_experts}."
            )
        if top_k == 1 and renormalize and num_experts > 1:
            raise ValueError(
                "MixtureOfExperts: with top_k=1 and renormalize=True the weight is always the same "
                "and the router never learns; pass renormalize=False."
            )
        if scores not in ("softmax", "sigmoid"):
            raise ValueError(f"MixtureOfExperts: scores={scores!r} must be 'softmax' or 'sigmoid'.")
        check_positive("MixtureOfExperts", "route_scale", route_scale)
        if num_groups < 1 or num_experts % num_groups:
            raise ValueError(
                f"MixtureOfExperts: num_experts={num_experts} is not a multiple of "
                f"num_groups={num_groups}."
            )
        if not 1 <= top_groups <= num_groups or top_groups * num_experts < top_k * num_groups:
            raise ValueError(
                f"MixtureOfExperts: top_groups={top_groups} of num_groups={num_groups} groups must "
                f"be at least 1 and have top_k={top_k} of the num_experts={num_experts} experts."
            )
        if group_score not in ("max", "top2"):
            raise ValueError(
                f"MixtureOfExperts: group_score={group_score!r} must be 'max' or 'top2'."
            )
        if group_score == "top2" and num_experts < 2 * num_groups:
            raise ValueError(
                f"MixtureOfExperts: group_score='top2' needs groups of at least two experts; there "
                f"are num_experts={num_experts} in num_groups={num_groups}."
            )
        if shared_gate and shared_experts is None:
            raise ValueError("MixtureOfExperts: shared_gate=True needs shared_experts.")
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"MixtureOfExperts: capacity_factor={capacity_factor} must be positive; None is no "
                "limit."
            )
        check_rate("MixtureOfExperts", "jitter", jitter)
        router_key, experts_key = jax.random.split(key)
        self.router = Linear(
            d_model, num_experts, use_bias=router_bias, dtype=dtype, key=router_key
        )
        keys = jax.random.split(experts_key, num_experts)
        self.experts = eqx.filter_vmap(lambda key: make_expert(key=key))(keys)
        self.shared_experts = shared_experts
        self.shared_gate = None
        if shared_gate:
            self.shared_gate = Linear(
                d_model, 1, dtype=dtype, key=jax.random.fold_in(router_key, 0)
            )
        self.selection_bits = jnp.zeros((num_experts,), jnp.int32) if selection_bias else None
        self.experts_fn = grouped_map
        self.inference = False
        self.num_experts = num_experts
        self.top_k = top_k
        self.scores = scores
        self.renormalize = renormalize
        self.route_scale = route_scale
        self.capacity_factor = None if capacity_factor is None else float(capacity_factor)
        self.jitter = jitter
        self.num_groups = num_groups
        self.top_groups = top_groups
        self.group_score = group_score

    @property
    def selection_bias(self) -> Float[Array, "*stack num_experts"] | None:
        """What is added to the scores for the choice, in float32; see `with_selection_bias`."""
        if self.selection_bits is None:
            return None
        return jax.lax.bitcast_convert_type(self.selection_bits, jnp.float32)

    def with_selection_bias(self, bias: Float[Array, "*stack num_experts"]) -> "MixtureOfExperts":
        """The same layer with another selection bias.

        It is not a parameter: its gradient would be zero, and weight decay would shrink it. So the
        layer stores the bits of the float32 numbers as integers, which no optimiser touches. To
        balance loads without a loss, after every step (Wang et al., 2024, algorithm 1):

            bias = moe.selection_bias + rate * jnp.sign(1 / num_experts - stats.load)
            moe = moe.with_selection_bias(bias)

        Raises:

        - `ValueError` if the layer has none, or one of another shape.
        """
        if self.selection_bits is None:
            raise ValueError(
                "MixtureOfExperts: there is no selection bias to replace; build the layer with "
                "selection_bias=True."
            )
        if bias.shape != self.selection_bits.shape:
            raise ValueError(
                f"MixtureOfExperts: the selection bias has shape {bias.shape} but must have "
                f"{self.selection_bits.shape}."
            )
        bits = jax.lax.bitcast_convert_type(bias.astype(jnp.float32), jnp.int32)
        return eqx.tree_at(lambda layer: layer.selection_bits, self, bits)

    @jax.named_scope("eqx_transformer.nn.MixtureOfExperts")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        valid: Bool[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Maps every position by the experts it chooses.

        Arguments:

        - `x`: the sequence.
        - `valid`: which positions count; the others are padding, choose no expert, take no
            capacity, and give zeros. All if not given.
        - `key`: for jitter, and for `shared_experts`.
        """
        return self._apply(x, valid, key)[0]

    @jax.named_scope("eqx_transformer.nn.MixtureOfExperts.apply_with_stats")
    @unbatched(x="seq d_model")
    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        valid: Bool[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], RouterStats]:
        """What `__call__` returns, and statistics of the router; the arguments are the same.

        Add the losses to the objective with coefficients, e.g. 1e-2 for `load_balance_loss` (Fedus
        et al., 2021) and 1e-3 for `z_loss` (Zoph et al., 2022).
        """
        y, routing, kept = self._apply(x, valid, key)
        return y, self._stats(routing, kept, valid)

    def _apply(
        self, x: Array, valid: Array | None, key: PRNGKeyArray | None
    ) -> tuple[Array, _Routing, Array]:
        router_key, shared_key = (None, None) if key is None else jax.random.split(key)
        if valid is not None:
            # A weight of zero would not keep a NaN in the padding out of the gradients.
            x = jnp.where(valid[:, None], x, 0)
        routing = self._route(x, router_key)
        # Padding goes to an expert past the last, which does not exist.
        chosen = routing.experts
        if valid is not None:
            chosen = jnp.where(valid[:, None], chosen, self.num_experts)
        if x.shape[0] == 0:
            out, kept = jnp.zeros((*chosen.shape, *x.shape[1:]), x.dtype), chosen < 0
        elif self.capacity_factor is None:
            out, kept = self._without_limit(x, chosen), chosen < self.num_experts
        else:
            out, kept = self._with_capacity(x, chosen)
        dtype = accumulation_dtype(x.dtype)
        y = jnp.einsum("sk,skd->sd", routing.weights.astype(dtype), out.astype(dtype))
        y = y.astype(x.dtype)
        if self.shared_experts is not None:
            shared = self.shared_experts(x, key=shared_key)
            if self.shared_gate is not None:
                shared = shared * jnp.broadcast_to(
                    jax.nn.sigmoid(self.shared_gate(x)), shared.shape
                )
            y = y + shared
        if valid is not None:
            y = jnp.where(valid[:, None], y, 0)
        return y, routing, kept

    def _route(self, x: Array, key: PRNGKeyArray | None) -> _Routing:
        h = x.astype(accumulation_dtype(x.dtype))
        if self.jitter > 0 and not self.inference:
            if key is None:
                raise RuntimeError(
                    f"MixtureOfExperts: jitter={self.jitter} needs a key; pass key=, or switch it "
                    "off with eqx.nn.inference_mode(model)."
                )
            low, high = 1 - self.jitter, 1 + self.jitter
            h = h * jax.random.uniform(key, h.shape, h.dtype, low, high)
        logits = self.router(h)
        # Logarithms of the scores, up to a constant for all experts.
        log_scores = jax.nn.log_sigmoid(logits) if self.scores == "sigmoid" else logits
        scores = jnp.exp(log_scores) if self.scores == "sigmoid" else jax.nn.softmax(logits)
        ranked = jax.lax.stop_gradient(logits)
        if self.selection_bias is not None:
            bias = jax.lax.stop_gradient(self.selection_bias).astype(scores.dtype)
            ranked = jax.lax.stop_gradient(scores) + jnp.broadcast_to(bias, scores.shape)
        elif self.group_score == "top2":
            # Groups by sums of scores need not be in the same order as by sums of logits.
            ranked = jax.lax.stop_gradient(scores)
        if self.top_groups < self.num_groups:
            ranked = self._in_best_groups(ranked)
        experts = jax.lax.top_k(ranked, self.top_k)[1]
        if self.renormalize:
            # Scores divided by their sum, even where all of them are tiny.
            weights = jax.nn.softmax(jnp.take_along_axis(log_scores, experts, axis=-1))
        else:
            weights = jnp.take_along_axis(scores, experts, axis=-1)
        log_p = jax.nn.log_softmax(log_scores)
        return _Routing(logits, log_p, experts, self.route_scale * weights)

    def _in_best_groups(self, ranked: Array) -> Array:
        """Minus infinity for the experts of all other groups."""
        groups = ranked.reshape(ranked.shape[0], self.num_groups, -1)
        best = jax.lax.top_k(groups, 1 if self.group_score == "max" else 2)[0].sum(axis=-1)
        chosen = jax.lax.top_k(best, self.top_groups)[1]
        kept = jax.nn.one_hot(chosen, self.num_groups, dtype=bool).any(axis=1)
        return jnp.where(kept[:, :, None], groups, -jnp.inf).reshape(ranked.shape)

    def _without_limit(self, x: Array, chosen: Array) -> Array:
        params, static = eqx.partition(self.experts, eqx.is_array)
        rows = jnp.repeat(x, self.top_k, axis=0)
        groups = chosen.reshape(-1)
        leaves, treedef = jax.tree.flatten(static)
        expert = _Expert(tuple(leaves), treedef)
        out = self.experts_fn(expert, params, rows, groups, self.num_experts)
        return out.reshape(*chosen.shape, -1)

    def _with_capacity(self, x: Array, chosen: Array) -> tuple[Array, Array]:
        """Every expert gets a buffer of as many rows as it accepts.

        The experts are batched over these, so their weights stay in place, even where they are
        spread over devices, or shared by a batch of sequences.
        """
        assert self.capacity_factor is not None
        seq = x.shape[0]
        capacity = math.ceil(self.capacity_factor * seq * self.top_k / self.num_experts)
        capacity = min(capacity, seq)
        order, place, starts = sorted_by_group(chosen.reshape(-1), self.num_experts)
        # Sorting is stable: the first rows of an expert are those of the earliest positions.
        rank = place - starts[chosen.reshape(-1)]
        kept = (rank < capacity).reshape(chosen.shape) & (chosen < self.num_experts)
        rows = starts[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
        filled = rows < starts[1:, None]
        rows = jnp.where(filled, order[jnp.where(filled, rows, 0)] // self.top_k, seq)
        buffers = jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
        out = eqx.filter_vmap(lambda expert, rows: _call(expert, rows))(self.experts, buffers)
        slots = jnp.where(kept, chosen * capacity + rank.reshape(chosen.shape), rows.size)
        out = out.reshape(rows.size, -1)
        return jnp.take(out, slots, axis=0, mode="fill", fill_value=0), kept

    def _stats(self, routing: _Routing, kept: Array, valid: Array | None) -> RouterStats:
        logits, experts = routing.logits, routing.experts
        valid = jnp.ones(logits.shape[:1], bool) if valid is None else valid
        share = valid.astype(logits.dtype) / jnp.maximum(valid.sum(), 1).astype(logits.dtype)
        choices = jnp.broadcast_to(share[:, None] / self.top_k, experts.shape)
        load = jnp.zeros(logits.shape[1:], logits.dtype).at[experts].add(choices)
        p = jnp.exp(routing.log_probability)
        probability = share @ p
        return RouterStats(
            load_balance_loss=self.num_experts * (load @ probability),
            z_loss=share @ jax.nn.logsumexp(logits, axis=-1) ** 2,
            entropy=-(share @ (p * routing.log_probability).sum(axis=-1)),
            load=load,
            probability=probability,
            dropped=jnp.where(kept, 0, choices).sum(),
        )


def _call(expert: Callable[[Array], Array], rows: Array) -> Array:
    out = expert(rows)
    if out.shape != rows.shape or out.dtype != rows.dtype:
        raise ValueError(
            f"MixtureOfExperts: an expert returned {out.dtype}{list(out.shape)} for "
            f"{rows.dtype}{list(rows.shape)}; it must keep shape and dtype."
        )
    return out


@dataclasses.dataclass(frozen=True)
class _Expert:
    """Applies an expert whose arrays are passed in.

    The rest of it is stored flattened: its leaves can be hashed, a dictionary of options cannot.
    """

    leaves: tuple[Any, ...]
    treedef: Any

    def __call__(self, params: PyTree, rows: Array) -> tuple[Array, None]:
        static = jax.tree.unflatten(self.treedef, self.leaves)
        return _call(eqx.combine(params, static), rows), None
