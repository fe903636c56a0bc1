import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._scan import filter_scan
from .._unbatched import unbatched
from ..attention import AbstractMask
from ..nn import DropPath
from ._block import AbstractBlock, BlockSequence

Model = TypeVar("Model")
Remat = bool | Callable[..., Any] | None


class Stack(eqx.Module):
    """Blocks applied one after another, with depth as an axis.

    All blocks are stored as one: every array of `blocks` has a leading axis, one entry per layer,
    and the stack scans over it. So tracing and compiling take the same time for two layers and for
    a hundred, and an optimiser sees few leaves. Note that parameters have one more axis than in a
    single layer: the weight of a norm has two.

    A pattern of different layers (five local, one global) is a block made of blocks. `layers_fn`
    runs the layers; `sharding.pipeline_parallel` replaces it.
    """

    blocks: AbstractBlock
    layers_fn: Callable[..., tuple[Array, Any]]
    num_layers: int = eqx.field(static=True)
    remat: Remat = eqx.field(static=True)
    unroll: int = eqx.field(static=True)

    def __init__(
        self,
        make_block: Callable[..., AbstractBlock],
        num_layers: int,
        *,
        remat: Remat = None,
        unroll: int = 1,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `make_block`: `make_block(key=key)` builds one block. It is traced once, for all layers.
        - `num_layers`: how many blocks.
        - `remat`: what reverse mode keeps of each block. `None`: all it needs. `True`: only the
            input, from which the block is recomputed. A policy of `jax.checkpoint_policies`: the
            input and what the policy saves.
        - `unroll`: how many blocks make one iteration of the loop; more take longer to compile and
            can run faster, above all on a CPU. Parameters are stacked either way.
        - `key`: split once for each layer, so that no two begin alike.
        """
        if num_layers < 1:
            raise ValueError(f"Stack: num_layers={num_layers} must be at least 1.")
        if unroll < 1:
            raise ValueError(f"Stack: unroll={unroll} must be at least 1.")
        keys = jax.random.split(key, num_layers)
        self.blocks = eqx.filter_vmap(lambda key: make_block(key=key))(keys)
        self.layers_fn = scan_layers
        self.num_layers = num_layers
        self.remat = remat
        self.unroll = unroll

    @classmethod
    def from_layers(
        cls, layers: Sequence[AbstractBlock], *, remat: Remat = None, unroll: int = 1
    ) -> "Stack":
        """Stacks existing blocks, e.g. those that `unstack` returned.

        Raises:

        - `ValueError` if there are none, or they differ in anything but the values of arrays.
        """
        layers = list(layers)
        if not layers:
            raise ValueError("Stack.from_layers: there must be at least one layer.")
        blocks = _stacked(layers)
        # Only the constructor can make a Module; the blocks that it builds are replaced.
        stack = cls(
            lambda *, key: layers[0],
            len(layers),
            remat=remat,
            unroll=unroll,
            key=jax.random.key(0),
        )
        return eqx.tree_at(lambda stack: stack.blocks, stack, blocks)

    @jax.named_scope("eqx_transformer.stacks.Stack")
    @unbatched(x="seq d_model")
    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """Applies the blocks in order.

        Arguments:

        - `x`: the sequence.
        - `context`: what else every block is given, such as a sequence to attend to.
        - `mask`: who may attend to whom, combined by `&` with the mask of every block.
        - `positions`: absolute positions; `0, 1, 2, ...` if not given.
        - `key`: for dropout; split once for each layer.
        """

        def apply(block: AbstractBlock, x: Array, **options: Any) -> tuple[Array, None]:
            return block(x, **options), None

        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.apply_with(apply, x, **options)[0]

    @jax.named_scope("eqx_transformer.stacks.Stack.apply_with_stats")
    @unbatched(x="seq d_model")
    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """What `__call__` returns, and statistics of the routers of mixtures of experts.

        Arguments are those of `__call__`.

        Returns:

        The sequence, and the blocks' `RouterStats`, each number with a leading axis for the layers;
        `None` if the blocks have no experts.

        Raises:

        - `ValueError` if the blocks are of a class without `apply_with_stats`.
        """

        def apply(block: Any, x: Array, **options: Any) -> tuple[Array, Any]:
            return block.apply_with_stats(x, **options)

        if not hasattr(self.blocks, "apply_with_stats"):
            raise ValueError(
                f"Stack: {type(self.blocks).__name__} has no apply_with_stats; call the stack, or "
                "give the block such a method."
            )
        options = {"context": context, "mask": mask, "positions": positions, "key": key}
        return self.apply_with(apply, x, **options)

    @unbatched(x="seq d_model")
    def apply_with(
        self,
        apply: Callable[..., tuple[Array, Any]],
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Applies the blocks in order, each by a function of yours: the way to look into a stack.

        Arguments:

        - `apply`: `apply(block, x, context=, mask=, positions=, key=)` is called with one block at
            a time and returns the next `x`, and anything else.
        - The others are those of `__call__`.

        Returns:

        The sequence, and everything else that `apply` returned, with a leading axis for the layers.
        """
        options = {"context": context, "mask": mask, "positions": positions}
        keys = None if key is None else jax.random.split(key, self.num_layers)

        how = {"num_layers": self.num_layers, "unroll": self.unroll, "remat": self.remat}
        return self.layers_fn(apply, self.blocks, keys, x, options, **how)

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> Any:
        """Empty caches for `max_len` positions, stacked like the blocks."""
        init = eqx.filter_vmap(
            lambda block: block.init_cache(max_len, dtype, context=context),
            axis_size=self.num_layers,
        )
        return init(self.blocks)

    @jax.named_scope("eqx_transformer.stacks.Stack.extend")
    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: Any,
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Maps the next positions of a sequence, given the caches of the earlier ones.

        Arguments and results are those of `AbstractBlock.extend`.
        """

        def step(x: Array, layer: tuple[AbstractBlock, Any]) -> tuple[Array, Any]:
            block, old = layer
            x, new = block.extend(x, old, context=context, mask=mask, length=length)
            if _structure(new) != _structure(old):  # a cache that gains groups of tokens
                return x, new
            # What a block returns unchanged (a memory it attends to) need not be copied.
            return x, jax.tree.map(lambda a, b: None if a is b else b, old, new)

        for leaf in jax.tree.leaves(eqx.filter(cache, eqx.is_array)):
            if leaf.shape[:1] != (self.num_layers,):
                raise ValueError(
                    f"Stack: the cache has an array of shape {leaf.shape}, but its first axis must "
                    f"be num_layers={self.num_layers}; make it with init_cache of this model."
                )
        xs = (self.blocks, cache)
        x, changed = filter_scan(step, x, xs, self.num_layers, unroll=self.unroll)
        grown = _structure(changed) != _structure(cache)
        return x, changed if grown else eqx.combine(changed, cache)

    def __len__(self) -> int:
        return self.num_layers

    def __getitem__(self, index: int) -> AbstractBlock:
        """Layer `index` on its own; negative indices count from the last."""
        i = operator.index(index)
        if not -self.num_layers <= i < self.num_layers:
            raise IndexError(f"Stack: no layer {i}; there are num_layers={self.num_layers}.")
        return jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, self.blocks)

    def __iter__(self) -> Iterator[AbstractBlock]:
        return iter(self.unstack())

    def unstack(self) -> tuple[AbstractBlock, ...]:
        """The layers, each on its own. `Stack.from_layers` is the inverse."""
        return tuple(self[i] for i in range(self.num_layers))


def scan_layers(
    apply: Callable[..., tuple[Array, Any]],
    blocks: AbstractBlock,
    keys: Array | None,
    x: Array,
    options: dict[str, Any],
    *,
    num_layers: int,
    unroll: int,
    remat: Remat,
) -> tuple[Array, Any]:
    """Applies stacked blocks to `x`, like `Stack.apply_with`; `keys` has one for each of them."""

    def step(x: Array, layer: tuple[AbstractBlock, Any]) -> tuple[Array, Any]:
        block, key = layer
        return apply(block, x, key=key, **options)

    return filter_scan(step, x, (blocks, keys), num_layers, unroll=unroll, remat=remat)


def linear_drop_path(stack: Stack, rate: float) -> Stack:
    """The stack with rates of `DropPath` that grow with depth: `rate * i / (num_layers - 1)`.

    (Huang et al., 2016, equation 4, beginning at zero.)

    Arguments:

    - `stack`: whose blocks contain `DropPath`s.
    - `rate`: that of the last layer.

    Raises:

    - `ValueError` if `rate` is out of range, or there is no `DropPath` in the blocks.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"linear_drop_path: rate={rate} must be at least 0 and below 1.")
    rates = rate * jnp.arange(stack.num_layers, dtype=jnp.float32) / max(stack.num_layers - 1, 1)
    scheduled = eqx.filter_vmap(DropPath)(rates).threshold

    def is_drop_path(x: Any) -> bool:
        return isinstance(x, DropPath)

    def drop_paths(stack: Stack) -> list[Any]:
        leaves = jax.tree.leaves(stack.blocks, is_leaf=is_drop_path)
        return [x.threshold for x in leaves if is_drop_path(x)]

    count = len(drop_paths(stack))
    if not count:
        raise ValueError("linear_drop_path: the blocks of the stack contain no DropPath.")
    # Each an array of its own: a buffer shared by two leaves could not be donated.
    return eqx.tree_at(drop_paths, stack, [jnp.array(scheduled) for _ in range(count)])


def unstacked(model: Model) -> Model:
    """The model with its layers unstacked: the faster form for decoding.

    Every `Stack` in it becomes a `BlockSequence` of its layers. A loop over depth first copies the
    weights and the cache of each layer out of those of all layers; for one token at a time this
    takes longer than using them. Here the copies are made once. The price is a program that grows
    with depth and takes longer to compile.

    Caches then have another structure: make them with the model that uses them. `Stack.from_layers`
    is the inverse, for a stack.
    """

    def is_stack(x: Any) -> bool:
        return isinstance(x, Stack)

    def taken_apart(x: Any) -> Any:
        return BlockSequence(x.unstack()) if is_stack(x) else x

    return jax.tree.map(taken_apart, model, is_leaf=is_stack)


def _stacked(layers: list[AbstractBlock]) -> AbstractBlock:
    first, structure = jax.tree_util.tree_flatten_with_path(layers[0])
    columns = [[leaf] for _, leaf in first]
    for i, layer in enumerate(layers[1:], start=1):
        leaves, other = jax.tree.flatten(layer)
        if other != structure:
            raise ValueError(
                f"Stack.from_layers: layer {i} differs from layer 0 at "
                f"{_difference(layer, layers[0])}."
            )
        for (path, reference), leaf, column in zip(first, leaves, columns, strict=True):
            if _kind(leaf) != _kind(reference):
                raise ValueError(
                    f"Stack.from_layers: layer {i} differs from layer 0 at "
                    f"{jax.tree_util.keystr(path)}: {_describe(leaf)} instead of "
                    f"{_describe(reference)}."
                )
            column.append(leaf)
    stacked = [jnp.stack(c) if eqx.is_array(c[0]) else c[0] for c in columns]
    return jax.tree.unflatten(structure, stacked)


def _difference(x: Any, reference: Any, path: str = "") -> str:
    """Where two PyTrees differ in structure: the first field, down to the smallest Module."""
    if isinstance(x, eqx.Module) and type(x) is type(reference):
        for field in dataclasses.fields(x):
            a, b = getattr(x, field.name), getattr(reference, field.name)
            if field.metadata.get("static", False):
                differ = a != b
            else:
                differ = jax.tree.structure(a) != jax.tree.structure(b)
            if differ:
                return _difference(a, b, f"{path}.{field.name}")
    return f"{path}: {eqx.tree_pformat(x)} instead of {eqx.tree_pformat(reference)}"


def _structure(cache: Any) -> Any:
    return jax.tree.structure(cache, is_leaf=lambda x: x is None)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if eqx.is_array(leaf) else repr(leaf)
