"""The output of a model as if it ended after each of its layers."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..stacks import BiasedStack, StackSequence
from ._capture import capture
from ._stacks import AbstractStandIn, is_stack, map_stacks, with_stand_ins


def logit_lens(model: Callable[..., Any], *, stack: str | None = None) -> Callable[..., Any]:
    """What the model would return if its last layers were left out.

        logit_lens(model)(tokens)       # [num_layers + 1, seq, vocab]: after none, one, ..., all

    Everything after the stack (the last norm, the head, a pooler) is applied to the residual stream
    before the first layer and after each layer. (nostalgebraist, Interpreting GPT: the logit lens,
    2020.)

    Arguments:

    - `model`: a model, or a method of one.
    - `stack`: the path of the stack, if a model has several: `"decoder"`.

    Returns:

    A function with the arguments of `model`. It returns what `model` returns with a leading axis,
    the last entry of which is what `model` returns.

    Raises:

    - `ValueError` if the model has no stack, or several.
    """
    found: list[Any] = []
    map_stacks(found.append, model, stack, _is_whole)
    if len(found) != 1:
        inside = "" if stack is None else f" at {stack!r}"
        raise ValueError(
            f"logit_lens: {type(model).__name__} has {len(found)} stacks{inside}, but it takes 1; "
            "name it with stack=."
        )
    return _LogitLens(model, stack)


class _LogitLens(eqx.Module):
    """See `logit_lens`."""

    model: Callable[..., Any]
    stack: str | None = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _, seen = capture(self.model, "input", "output", stack=self.stack)(*args, **kwargs)

        def read(state: Array) -> Any:
            rest = with_stand_ins(lambda x: _Constant(x, state), self.model, self.stack)
            return rest(*args, **kwargs)

        return jax.vmap(read)(jnp.concatenate([seen["input"][:1], seen["output"]]))


class _Constant(AbstractStandIn):
    """Returns a given state in place of what the layers would compute."""

    inner: Any
    x: Float[Array, "seq d_model"]

    def __call__(self, x: Array, **options: Any) -> Array:
        return self.x

    def apply_with_stats(self, x: Array, **options: Any) -> tuple[Array, None]:
        return self.x, None


def _is_whole(x: Any) -> bool:
    return isinstance(x, StackSequence | BiasedStack) or is_stack(x)
