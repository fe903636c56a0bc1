"""The error for the commonest mistake: a batch handed to what takes one example."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def unbatched(**axes: str) -> Callable[[Function], Function]:
    """Checks how many axes arguments of a method have, before anything else happens to them.

    `@unbatched(x="seq d_model")` says that `x` has two axes. Types checked at run time would find
    the mistake as well, but only where they are switched on, and without saying what to do.

    Arguments:

    - `axes`: for each array argument, the names of its axes, separated by spaces.
    """

    # A jaxtyping import hook adds its decorator below the ones it finds, so this one is outside
    # of it and runs first.
    def decorator(method: Function) -> Function:
        names = list(inspect.signature(method).parameters)
        index = {name: names.index(name) for name in axes}
        expected = {name: spec.split() for name, spec in axes.items()}

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            for name, spec in expected.items():
                if index[name] < len(args):
                    value = args[index[name]]
                elif name in kwargs:
                    value = kwargs[name]
                else:
                    continue
                shape = np.shape(value)
                if len(shape) != len(spec):
                    raise ValueError(_message(type(args[0]).__name__, name, shape, spec))
            return method(*args, **kwargs)

        return wrapper  # pyright: ignore[reportReturnType]

    return decorator


def _message(owner: str, name: str, shape: tuple[int, ...], spec: list[str]) -> str:
    fix = (
        "wrap the call in jax.vmap."
        if len(shape) > len(spec)
        else "add the missing ones, e.g. with x[None]."
    )
    return (
        f"{owner} takes one example: {name} has {len(shape)} axes {shape} but must be "
        f"[{', '.join(spec)}]; {fix}"
    )
