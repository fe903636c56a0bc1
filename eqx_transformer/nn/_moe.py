import dataclasses
import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PRNGKeyArray, PyTree

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention._linear_map import linear_map
from ..attention._varying import vary_alike
from ._linear import Linear


class RouterStats(eqx.Module):
    """What the router of a `MixtureOfExperts` did with one sequence.

    Everything is in float32 or wider and differentiable where that has a meaning. Choices are
    counted before any is dropped. Padding does not count.

    With `load` and `probability` averaged over a batch, `num_experts * load @ probability` is the
    load-balance loss of the batch as a whole, which is a weaker demand than that of every sequence.
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
    experts: Int[Array, "seq top_k"]
    weights: Float[Array, "seq top_k"]


class MixtureOfExperts(eqx.Module):
    """A layer of many experts, of which a router chooses a few for every position.

        logits  = router(x)
        scores  = softmax(logits)  or  sigmoid(logits)
        experts = top_k(scores + selection_bias)
        weights = route_scale * scores[experts] / sum(scores[experts])
        y       = sum_i weights[i] * experts[i](x)  +  shared_experts(x)

    Takes the place of an `MLP`. Only what is chosen is computed. There is no state: losses and
    loads are returned by `apply_with_stats`. (Shazeer et al., 2017; softmax and capacity: Fedus et
    al., 2021; sigmoid, `selection_bias`, `route_scale` and shared experts: DeepSeek-AI, 2024,
    "DeepSeek-V3 Technical Report", equations 12 to 16.)
    """

    router: Linear
    experts: Callable[[Array], Array]
    shared_experts: Callable[..., Array] | None
    selection_bits: Int[Array, " num_experts"] | None
    inference: bool
    num_experts: int = eqx.field(static=True)
    top_k: int = eqx.field(static=True)
    scores: Literal["softmax", "sigmoid"] = eqx.field(static=True)
    renormalize: bool = eqx.field(static=True)
    route_scale: float = eqx.field(static=True)
    capacity_factor: float | None = eqx.field(static=True)
    jitter: float = eqx.field(static=True)

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
        capacity_factor: float | int | None = None,
        shared_experts: Callable[..., Array] | None = None,
        jitter: float = 0.0,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `d_model`: size of the input and the output.
        - `num_experts`: how many experts.
        - `make_expert`: `make_expert(key=key)` builds one expert, a Module that maps every row of
            `[rows, d_model]` on its own, e.g. `eqx.Partial(GatedMLP, d_model, d_ff)`. It is called
            without a key. Blocks of rows are filled up with zeros, where it must be finite.
        - `top_k`: how many experts a position chooses.
        - `scores`: how logits become scores, `"softmax"` over all experts or `"sigmoid"` of each.
        - `renormalize`: whether the weights of a position sum to `route_scale`. With `"softmax"`
            that is the softmax over the chosen logits alone, as in Mixtral. Not with `top_k=1`,
            where the router would get no gradient.
        - `route_scale`: factor on the weights.
        - `selection_bias`: whether there is a number for every expert that is added to its score
            for the choice, and for the choice only; initially zero. It has no gradient, see
            `with_selection_bias`.
        - `capacity_factor`: how many positions an expert accepts, as a multiple of the mean:
            `ceil(capacity_factor * seq * top_k / num_experts)`. Earlier positions come first, so
            that what happens to one does not depend on later ones. What an expert does not accept
            adds nothing to the output. `None`: no limit, nothing is dropped.
        - `shared_experts`: a Module that every position goes through besides, such as an `MLP`;
            called as `shared_experts(x, key=key)`.
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
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(
                f"MixtureOfExperts: capacity_factor={capacity_factor} must be positive; None is no "
                "limit."
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"MixtureOfExperts: jitter={jitter} must be at least 0 and below 1.")
        router_key, experts_key = jax.random.split(key)
        self.router = Linear(d_model, num_experts, dtype=dtype, key=router_key)
        keys = jax.random.split(experts_key, num_experts)
        self.experts = eqx.filter_vmap(lambda key: make_expert(key=key))(keys)
        self.shared_experts = shared_experts
        self.selection_bits = jnp.zeros((num_experts,), jnp.int32) if selection_bias else None
        self.inference = False
        self.num_experts = num_experts
        self.top_k = top_k
        self.scores = scores
        self.renormalize = renormalize
        self.route_scale = route_scale
        self.capacity_factor = None if capacity_factor is None else float(capacity_factor)
        self.jitter = jitter

    @property
    def selection_bias(self) -> Float[Array, "*stack num_experts"] | None:
        """What is added to the scores for the choice, in float32; see `with_selection_bias`."""
        if self.selection_bits is None:
            return None
        return jax.lax.bitcast_convert_type(self.selection_bits, jnp.float32)

    def with_selection_bias(self, bias: Float[Array, "*stack num_experts"]) -> "MixtureOfExperts":
        """The same layer with another selection bias.

        It is no parameter: its gradient would be zero, and weight decay would shrink it. So the
        layer keeps the bits of the float32 numbers as integers, which no optimiser touches. To
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
        """What `__call__` returns, and what the router did; arguments as there.

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
        # Who goes nowhere goes to an expert past the last.
        chosen = routing.experts
        if valid is not None:
            chosen = jnp.where(valid[:, None], chosen, self.num_experts)
        if self.capacity_factor is None:
            out, kept = self._without_limit(x, chosen), chosen < self.num_experts
        else:
            out, kept = self._with_capacity(x, chosen)
        dtype = accumulation_dtype(x.dtype)
        y = jnp.einsum("sk,skd->sd", routing.weights.astype(dtype), out.astype(dtype))
        y = y.astype(x.dtype)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x, key=shared_key)
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
        sigmoid = self.scores == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
        ranked = jax.lax.stop_gradient(scores)
        if self.selection_bias is not None:
            bias = jax.lax.stop_gradient(self.selection_bias).astype(scores.dtype)
            ranked = ranked + jnp.broadcast_to(bias, ranked.shape)
        experts = jax.lax.top_k(ranked, self.top_k)[1]
        if self.renormalize and not sigmoid:
            # The same as dividing by the sum, but for scores that are all tiny as well.
            weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1), axis=-1)
        else:
            weights = jnp.take_along_axis(scores, experts, axis=-1)
            if self.renormalize:
                weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return _Routing(logits, experts, self.route_scale * weights)

    def _without_limit(self, x: Array, chosen: Array) -> Array:
        params, static = eqx.partition(self.experts, eqx.is_array)
        rows = jnp.repeat(x, self.top_k, axis=0)
        out, _ = _grouped(
            vary_alike((params, rows, chosen.reshape(-1))),
            block=_Expert(static),
            num_groups=self.num_experts,
        )
        return out.reshape(*chosen.shape, -1)

    def _with_capacity(self, x: Array, chosen: Array) -> tuple[Array, Array]:
        """Every expert gets a buffer of as many rows as it accepts.

        The experts are batched over these, so their weights stay where they are, also where they
        are spread over devices, or shared by a batch of sequences.
        """
        assert self.capacity_factor is not None
        seq = x.shape[0]
        capacity = math.ceil(self.capacity_factor * seq * self.top_k / self.num_experts)
        capacity = min(capacity, seq)
        order, place, starts = _sorted_by_group(chosen.reshape(-1), self.num_experts)
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
        # Of the scores, normalised: the logarithm of softmax or sigmoid, minus that of the sum.
        log_scores = jax.nn.log_sigmoid(logits) if self.scores == "sigmoid" else logits
        log_p = jax.nn.log_softmax(log_scores, axis=-1)
        choices = jnp.broadcast_to(share[:, None] / self.top_k, experts.shape)
        load = jnp.zeros(logits.shape[1:], logits.dtype).at[experts].add(choices)
        probability = share @ jnp.exp(log_p)
        return RouterStats(
            load_balance_loss=self.num_experts * (load @ probability),
            z_loss=share @ jax.nn.logsumexp(logits, axis=-1) ** 2,
            entropy=-(share @ (jnp.exp(log_p) * log_p).sum(axis=-1)),
            load=load,
            probability=probability,
            dropped=jnp.where(kept, 0, choices).sum(),
        )


def _call(expert: Callable[[Array], Array], rows: Array) -> Array:
    out = expert(rows)
    if out.shape != rows.shape or out.dtype != rows.dtype:
        raise ValueError(
            f"MixtureOfExperts: an expert made {out.dtype}{list(out.shape)} of "
            f"{rows.dtype}{list(rows.shape)}; it must keep shape and dtype."
        )
    return out


# Rows of a sequence, each through the expert it chose, with a number of rows per expert that is
# only known at run time.
#
# Rows are sorted by expert and cut into blocks of one expert each, and a loop runs over as many
# blocks as there are. It reads the weights where they are, and adds their gradients up where they
# are. Measured on two CPU cores (64 experts of 256 x 512, 2 of them for each of 1,024 positions;
# forward and backward): 100 ms and 14 MiB of temporary memory. Left to JAX, a `vmap` over blocks
# with the weights of each gathered takes 190 ms and 270 MiB, a `scan` over blocks 200 ms and
# 250 MiB, all experts for all positions 1,600 ms and 1,300 MiB. `jax.lax.ragged_dot` is the latter
# on a CPU, has no `vmap` over rows alone, and takes matrices only.
#
# JAX differentiates no such loop, and batched it would run with a copy of the weights for every
# sequence. So the map has rules. It is closed under differentiation: its tangent is the same map
# for the tangent of the expert, its transpose the same map for the transpose of that. Hence every
# derivative of every order is again one loop over the same blocks. A batch becomes more rows.

_Block = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
"""From the arrays of one expert, and rows: results for every row, and sums over the rows."""


@dataclasses.dataclass(frozen=True)
class _Expert:
    """Applies an expert; nothing is summed."""

    static: Hashable

    def __call__(self, params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        return _call(eqx.combine(params, self.static), rows), None


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """The derivative of `block`, linear in the second halves of parameters and rows."""

    block: _Block

    def __call__(self, params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        (params, dparams), (rows, drows) = params, rows
        primals, tangents = (params, rows), (dparams, drows)
        moving, still = eqx.partition(primals, _moving(primals, tangents))
        # Not `eqx.filter_jvp`, which leaves out tangents that are zero: the structure of the
        # result must not depend on what the block does.
        return jax.jvp(lambda x: self.block(*eqx.combine(x, still)), (moving,), (tangents,))[1]


@dataclasses.dataclass(frozen=True)
class _Transpose:
    """The transpose of that: cotangents of sums come with the parameters, those of rows with rows.

    What belongs to a row is returned for every row, what belongs to the parameters is summed.
    """

    block: _Block
    moving: tuple[bool, ...]

    def __call__(self, params: PyTree, rows: PyTree) -> tuple[PyTree, PyTree]:
        (params, sum_cotangents), (rows, row_cotangents) = params, rows
        leaves, treedef = jax.tree.flatten((params, rows))
        mask = jax.tree.unflatten(treedef, self.moving)
        moving, still = eqx.partition((params, rows), mask)
        _, pull = jax.vjp(lambda moving: self.block(*eqx.combine(moving, still)), moving)
        ((dparams, drows),) = pull((row_cotangents, sum_cotangents))
        return drows, dparams


def _moving(primals: PyTree, tangents: PyTree) -> PyTree:
    return jax.tree.map(lambda _, tangent: tangent is not None, primals, tangents)


@dataclasses.dataclass(frozen=True)
class _Push:
    """`_Tangent` of all rows, as a linear map of the tangents."""

    block: _Block
    num_groups: int

    def __call__(self, residuals: PyTree, operands: PyTree) -> tuple[PyTree, PyTree]:
        (params, rows, groups), (dparams, drows) = residuals, operands
        inputs = ((params, dparams), (rows, drows), groups)
        return _grouped(inputs, block=_Tangent(self.block), num_groups=self.num_groups)


@dataclasses.dataclass(frozen=True)
class _Pull:
    """`_Transpose` of all rows, as a linear map of the cotangents."""

    block: _Block
    num_groups: int
    moving: tuple[bool, ...]

    def __call__(self, residuals: PyTree, cotangents: PyTree) -> tuple[PyTree, PyTree]:
        (params, rows, groups), (row_cotangents, sum_cotangents) = residuals, cotangents
        inputs = ((params, sum_cotangents), (rows, row_cotangents), groups)
        block = _Transpose(self.block, self.moving)
        drows, dparams = _grouped(inputs, block=block, num_groups=self.num_groups)
        return dparams, drows


@eqx.filter_custom_jvp
def _grouped(inputs: PyTree, *, block: _Block, num_groups: int) -> tuple[PyTree, PyTree]:
    """Applies `block` to the rows of every group, with the parameters of that group.

    Arguments:

    - `inputs`: parameters `[num_groups, ...]`, rows `[rows, ...]`, and the group of every row;
        rows of group `num_groups` go nowhere and give zeros.
    - `block`: a hashable function.
    - `num_groups`: how many groups.

    Returns:

    Results for every row `[rows, ...]`, and sums for every group `[num_groups, ...]`.
    """
    return _compiled(inputs, block, num_groups)


@eqx.filter_jit
def _compiled(inputs: PyTree, block: _Block, num_groups: int) -> tuple[PyTree, PyTree]:
    # Compiled once a structure and shape, also for callers who do not use `jax.jit`.
    return _foldable(block, num_groups)(*inputs)


@_grouped.def_jvp
def _grouped_jvp(
    primals: Any, tangents: Any, *, block: _Block, num_groups: int
) -> tuple[PyTree, PyTree]:
    ((params, rows, groups),), ((dparams, drows, _),) = primals, tangents
    out = _grouped((params, rows, groups), block=block, num_groups=num_groups)
    moving = tuple(jax.tree.leaves(_moving((params, rows), (dparams, drows))))
    dout = linear_map(
        _Push(block, num_groups),
        _Pull(block, num_groups, moving),
        (params, rows, groups),
        (dparams, drows),
    )
    return out, dout


def _foldable(block: _Block, num_groups: int) -> Callable[..., Any]:
    """The loop, with a rule for batches: one loop over the rows of all examples.

    Only computes: derivatives are taken outside, so that JAX's having none of reverse mode for
    `custom_vmap` is no loss.
    """
    run = custom_vmap(partial(_loop, block, num_groups))

    @run.def_vmap
    def rule(size: int, batched: Any, params: PyTree, rows: PyTree, groups: Array) -> Any:
        params_batched, rows_batched, groups_batched = batched

        def spread(x: Array, is_batched: bool) -> Array:
            return x if is_batched else jnp.broadcast_to(x[None], (size, *x.shape))

        def fold(x: Array, is_batched: bool) -> Array:
            return spread(x, is_batched).reshape(-1, *x.shape[1 + is_batched :])

        def own(x: Array, is_batched: bool) -> Array:
            # What all examples share stays as it is: groups are counted modulo its length.
            if not is_batched:
                return x
            repeats = num_groups // x.shape[1]
            return jnp.tile(x, (1, repeats, *(1,) * (x.ndim - 2))).reshape(-1, *x.shape[2:])

        _, sums = _shapes(block, _example(params, params_batched), _example(rows, rows_batched), 1)
        rows = jax.tree.map(fold, rows, rows_batched)
        groups = spread(groups, groups_batched)
        if jax.tree.leaves(sums) or any(jax.tree.leaves(params_batched)):
            first = num_groups * jnp.arange(size, dtype=groups.dtype)[:, None]
            nowhere = groups == num_groups
            groups = jnp.where(nowhere, size * num_groups, groups + first)
            params = jax.tree.map(own, params, params_batched)
            total = size * num_groups
        else:
            total = num_groups
        out, sums = _foldable(block, total)(params, rows, groups.reshape(-1))
        result = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), (out, sums))
        return result, jax.tree.map(lambda _: True, result)

    return run


def _example(tree: PyTree, batched: PyTree) -> PyTree:
    def strip(x: Array, is_batched: bool) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape[is_batched:], x.dtype)

    return jax.tree.map(strip, tree, batched)


def _shapes(block: _Block, params: PyTree, rows: PyTree, size: int) -> tuple[PyTree, PyTree]:
    """What `block` makes of `size` rows."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), rows)
    return jax.eval_shape(block, params, rows)


def _loop(
    block: _Block, num_groups: int, params: PyTree, rows: PyTree, groups: Int[Array, " rows"]
) -> tuple[PyTree, PyTree]:
    """`_grouped` for one example, without derivatives."""
    num_rows = groups.shape[0]
    size = _block_size(num_rows, num_groups)
    order, place, starts = _sorted_by_group(groups, num_groups)
    blocks = -(-jnp.diff(starts) // size)
    ends = jnp.cumsum(blocks)
    # Blocks that are not full: at most one a group.
    most = min(num_rows, num_rows // size + num_groups)
    group_of = jnp.repeat(jnp.arange(num_groups, dtype=jnp.int32), blocks, total_repeat_length=most)
    first_of = starts[group_of] + size * (
        jnp.arange(most, dtype=jnp.int32) - (ends - blocks)[group_of]
    )
    order = jnp.pad(order, (0, size))

    def run(i: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        outs, sums = carry
        group, first = group_of[i], first_of[i]
        which = jax.lax.dynamic_slice_in_dim(order, first, size)
        live = jnp.arange(size, dtype=jnp.int32) < starts[group + 1] - first

        def of_group(x: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x, group % x.shape[0], keepdims=False)

        def of_rows(x: Array) -> Array:
            return jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x[which], 0)

        out, add = block(jax.tree.map(of_group, params), jax.tree.map(of_rows, rows))
        # Past the last live row this writes what the next block, the next in order, overwrites.
        outs = jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first, axis=0), outs, out
        )
        sums = jax.tree.map(lambda x, y: x.at[group].add(y.astype(x.dtype)), sums, add)
        return outs, sums

    out_shapes, sum_shapes = _shapes(block, params, rows, size)
    zeros = (
        jax.tree.map(lambda x: jnp.zeros((num_rows + size, *x.shape[1:]), x.dtype), out_shapes),
        jax.tree.map(
            lambda x: jnp.zeros((num_groups, *x.shape), accumulation_dtype(x.dtype)), sum_shapes
        ),
    )
    start = vary_alike(zeros, like=(params, rows, groups))
    outs, sums = jax.lax.fori_loop(0, ends[-1], run, start)

    def unsorted(x: Array) -> Array:
        live = (groups < num_groups).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(live, x[place], 0)

    sums = jax.tree.map(lambda x, shape: x.astype(shape.dtype), sums, sum_shapes)
    return jax.tree.map(unsorted, outs), sums


def _block_size(num_rows: int, num_groups: int) -> int:
    """A power of two, about twice the mean: most groups are one block, which is loaded once."""
    mean = max(1, num_rows // num_groups)
    return min(max(8, 2 ** math.ceil(math.log2(2 * mean))), 256)


def _sorted_by_group(groups: Int[Array, " rows"], num_groups: int) -> tuple[Array, Array, Array]:
    """The rows sorted by group, where each one went, and `[num_groups + 1]` where groups begin."""
    num_rows = groups.shape[0]
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(num_rows, dtype=jnp.int32))
    bounds = jnp.arange(num_groups + 1, dtype=groups.dtype)
    starts = jnp.searchsorted(groups[order], bounds, side="left").astype(jnp.int32)
    return order, place, starts
