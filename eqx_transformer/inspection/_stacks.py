"""The stacks of a model, and replacing them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

from ..stacks import AbstractBlock, BiasedStack, Stack


class AbstractStandIn(eqx.Module):
    """Replaces a stack, or a block, for one call.

    It has `blocks`, because models that share a bias reach into these before they call a stack.
    """

    inner: eqx.AbstractVar[Any]

    @property
    def blocks(self) -> Any:
        """The blocks of the stack."""
        return self.inner.blocks

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return self.inner.num_layers


def is_stack(x: Any) -> bool:
    """Whether this is a stack, or a block outside any stack."""
    return isinstance(x, Stack | AbstractBlock)


def map_stacks(
    function: Callable[[Any], Any],
    model: Any,
    stack: str | None,
    is_stack: Callable[[Any], bool] = is_stack,
) -> Any:
    """The model with `function(x)` in place of every stack whose path begins with `stack`."""

    def visit(path: tuple[Any, ...], x: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        # A method is a PyTree too, which holds the model as `__self__`.
        name = name.removeprefix("__self__.")
        chosen = stack is None or f"{name}.".startswith(f"{stack}.")
        return function(x) if is_stack(x) and chosen else x

    return jax.tree_util.tree_map_with_path(visit, model, is_leaf=is_stack)


def with_stand_ins(make: Callable[[Any], AbstractStandIn], model: Any, stack: str | None) -> Any:
    """The model with `make(x)` in place of every stack, or block, that it calls."""

    def is_called(x: Any) -> bool:
        return isinstance(x, BiasedStack) or is_stack(x)

    def visit(x: Any) -> AbstractStandIn:
        return make(x.spread() if isinstance(x, BiasedStack) else x)

    return map_stacks(visit, model, stack, is_called)


def stacks_of(model: Any, stack: str | None) -> list[Any]:
    """All stacks whose path begins with `stack`, in order."""
    found: list[Any] = []

    def visit(x: Any) -> Any:
        found.append(x)
        return x

    map_stacks(visit, model, stack)
    return found
