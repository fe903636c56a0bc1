"""Depth with layers of different kinds: stacks one after another."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import AbstractMask
from ._block import AbstractBlock, BlockSequence
from ._stack import Remat, Stack


class StackSequence(eqx.Module):
    """Stacks one after another, used like one: a model whose layers are of several kinds.

    Gemma 3's 26 layers are a stack of four times five local blocks and a global one, and a stack of
    two local ones; DeepSeek's are a stack of dense blocks and one of mixtures of experts. See
    `stack_of_kinds`, which finds such a division.

    Arguments:

    - `stacks`: in the order in which they are applied.
    """

    stacks: tuple[Stack, ...]

    def __check_init__(self) -> None:
        if not self.stacks:
            raise ValueError("StackSequence: there must be at least one stack.")

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
        """Applies the blocks in order; see `Stack`."""
        for stack, stack_key in zip(self.stacks, self._keys(key), strict=True):
            x = stack(x, context=context, mask=mask, positions=positions, key=stack_key)
        return x

    @unbatched(x="seq d_model")
    def apply_with_stats(
        self,
        x: Float[Array, "seq d_model"],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        positions: Int[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], tuple[Any, ...]]:
        """What `__call__` returns, and the statistics of every stack; see `Stack`."""
        stats = []
        for stack, stack_key in zip(self.stacks, self._keys(key), strict=True):
            options = {"context": context, "mask": mask, "positions": positions, "key": stack_key}
            x, of_stack = stack.apply_with_stats(x, **options)
            stats.append(of_stack)
        return x, tuple(stats)

    def init_cache(
        self, max_len: int, dtype: DTypeLike | None = None, *, context: Any = None
    ) -> tuple[Any, ...]:
        """The empty caches of the stacks."""
        return tuple(stack.init_cache(max_len, dtype, context=context) for stack in self.stacks)

    @unbatched(x="seq d_model")
    def extend(
        self,
        x: Float[Array, "seq d_model"],
        cache: tuple[Any, ...],
        *,
        context: Any = None,
        mask: AbstractMask | None = None,
        length: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "seq d_model"], tuple[Any, ...]]:
        """Maps the next positions of a sequence; see `AbstractBlock.extend`."""
        caches = []
        for stack, old in zip(self.stacks, cache, strict=True):
            x, new = stack.extend(x, old, context=context, mask=mask, length=length)
            caches.append(new)
        return x, tuple(caches)

    def __len__(self) -> int:
        return sum(_num_layers(stack) for stack in self.stacks)

    def __getitem__(self, index: int) -> AbstractBlock:
        """Layer `index` on its own; negative indices count from the last."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"StackSequence: no layer {index}; there are {len(self)}.")
        index %= len(self)
        for stack in self.stacks:
            if index < _num_layers(stack):
                return _layer(stack, index)
            index -= _num_layers(stack)
        raise AssertionError

    def __iter__(self) -> Iterator[AbstractBlock]:
        return (self[i] for i in range(len(self)))

    def _keys(self, key: PRNGKeyArray | None) -> Any:
        count = len(self.stacks)
        return [None] * count if key is None else jax.random.split(key, count)


class LayerAddress(NamedTuple):
    """Where a layer is in a stack: its arrays are `leaf[index]` of those under `path`."""

    path: str
    """As `jax.tree_util.keystr` writes it, e.g. `.stacks[0].blocks.blocks[5]`."""
    index: int


def layer_address(stack: Stack | StackSequence, layer: int) -> LayerAddress:
    """Where layer number `layer` is, counting the blocks inside `BlockSequence`s.

    Raises:

    - `IndexError` if there is no such layer.
    """
    stacks, base = [stack], ""
    if isinstance(stack, StackSequence):
        stacks = list(stack.stacks)
    rest = layer
    for i, part in enumerate(stacks):
        assert isinstance(part, Stack)
        if isinstance(stack, StackSequence):
            base = f".stacks[{i}]"
        if 0 <= rest < _num_layers(part):
            index, member = divmod(rest, _period(part))
            inside = f".blocks[{member}]" if isinstance(part.blocks, BlockSequence) else ""
            return LayerAddress(f"{base}.blocks{inside}", index)
        rest -= _num_layers(part)
    raise IndexError(f"layer_address: no layer {layer}; there are {layer - rest}.")


def stack_of_kinds(
    make_block: Callable[..., AbstractBlock],
    kinds: Sequence[Hashable],
    *,
    remat: Remat = None,
    unroll: int = 1,
    key: PRNGKeyArray,
) -> Stack | StackSequence:
    """A stack of layers of the given kinds, in this order, that traces as few blocks as possible.

    Layers that are all alike become one `Stack` of plain blocks; a pattern that repeats, one of
    `BlockSequence`s; anything else, a `StackSequence` of these.

    Arguments:

    - `make_block`: `make_block(kind, key=key)` builds one block.
    - `kinds`: the kind of every layer.
    - `remat`, `unroll`: see `Stack`; a stack that is shorter than `unroll` is unrolled.
    - `key`: for the initial weights.
    """
    runs = repeating_runs(kinds)
    keys = [key] if len(runs) == 1 else list(jax.random.split(key, len(runs)))
    stacks = []
    for (pattern, repeats), run_key in zip(runs, keys, strict=True):
        make = eqx.Partial(_make_period, make_block, pattern)
        options = {"remat": remat, "unroll": min(unroll, repeats)}
        stacks.append(Stack(make, repeats, key=run_key, **options))
    return stacks[0] if len(stacks) == 1 else StackSequence(tuple(stacks))


def repeating_runs(kinds: Sequence[Hashable]) -> list[tuple[tuple[Hashable, ...], int]]:
    """Divides a sequence into patterns that repeat: `AABABAB` is `A` once and `AB` three times.

    It minimises the sum of the lengths of the patterns, then their number; ties go to the division
    whose first run is the longest.
    """
    kinds, n = tuple(kinds), len(kinds)
    if not n:
        raise ValueError("repeating_runs: there must be at least one layer.")
    # The best division from i on: its cost, the period it begins with, and how often that repeats.
    best: list[tuple[tuple[int, int], int, int]] = [((0, 0), 0, 0)] * (n + 1)
    for i in reversed(range(n)):
        choices = []
        for period in range(1, n - i + 1):
            repeats = 1
            while True:
                (length, count), _, _ = best[i + period * repeats]
                cost = (length + period, count + 1)
                choices.append((cost, -period * repeats, period, repeats))
                start = i + period * repeats
                if start + period > n or kinds[start : start + period] != kinds[i : i + period]:
                    break
                repeats += 1
        cost, _, period, repeats = min(choices)
        best[i] = (cost, period, repeats)
    runs, i = [], 0
    while i < n:
        _, period, repeats = best[i]
        runs.append((kinds[i : i + period], repeats))
        i += period * repeats
    return runs


def _make_period(
    make_block: Callable[..., AbstractBlock], pattern: tuple[Hashable, ...], *, key: PRNGKeyArray
) -> AbstractBlock:
    if len(pattern) == 1:
        return make_block(pattern[0], key=key)
    keys = jax.random.split(key, len(pattern))
    return BlockSequence(
        tuple(make_block(kind, key=key) for kind, key in zip(pattern, keys, strict=True))
    )


def _period(stack: Stack) -> int:
    return len(stack.blocks.blocks) if isinstance(stack.blocks, BlockSequence) else 1


def _num_layers(stack: Stack) -> int:
    return stack.num_layers * _period(stack)


def _layer(stack: Stack, index: int) -> AbstractBlock:
    index, member = divmod(index, _period(stack))
    block = stack[index]
    return block.blocks[member] if isinstance(block, BlockSequence) else block
