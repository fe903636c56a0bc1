"""Errors for the most common mistakes, above all a batch passed to what takes one example."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def unbatched(**axes: str) -> Callable[[Function], Function]:
    """Checks how many axes the arguments of a method have, before anything else happens to them.

    `@unbatched(x="seq d_model")` says that `x` has two axes. Run-time type checking would find the
    mistake as well, but only where it is switched on, and without saying what to do.

    Arguments:

    - `axes`: for each array argument, the names of its axes, separated by spaces.

    Keyword arguments that all methods share (`key`, `mask`, `positions`) are checked as well.
    """

    # A jaxtyping import hook adds its decorator below the ones it finds, so this one is outside
    # of it and runs first.
    def decorator(method: Function) -> Function:
        names = list(inspect.signature(method).parameters)
        index = {name: names.index(name) for name in axes}
        expected = {name: spec.split() for name, spec in axes.items()}

        @functools.wraps(method)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            owner, seq = type(args[0]).__name__, None
            for name, spec in expected.items():
                if index[name] < len(args):
                    value = args[index[name]]
                elif name in kwargs:
                    value = kwargs[name]
                else:
                    continue
                if isinstance(value, list | tuple):
                    raise ValueError(
                        f"{owner}: {name} is a {type(value).__name__}; make it an array, e.g. with "
                        "jnp.asarray."
                    )
                shape = np.shape(value)
                if len(shape) != len(spec):
                    raise ValueError(_message(owner, name, shape, spec))
                if spec[0] == "seq":
                    seq = shape[0]
            _check_options(owner, seq, kwargs)
            return method(*args, **kwargs)

        return wrapper  # pyright: ignore[reportReturnType]

    return decorator


def _check_options(owner: str, seq: int | None, options: dict[str, Any]) -> None:
    """Checks options for common mistakes that would otherwise fail far from here."""
    key, mask, positions = (options.get(name) for name in ("key", "mask", "positions"))
    if isinstance(key, int):
        raise ValueError(f"{owner}: key={key} is a number; use jax.random.key({key}).")
    if isinstance(mask, jax.Array | np.ndarray | list):
        raise ValueError(
            f"{owner}: mask is an array but must be a mask: Dense(matrix) for one flag per query "
            "and key, Padding(flags) for one per key; see eqx_transformer.attention."
        )
    if seq is not None and positions is not None and np.shape(positions) != (seq,):
        raise ValueError(
            f"{owner}: positions has shape {np.shape(positions)} but seq={seq}; give one position "
            "for each, and wrap the call in jax.vmap for a batch."
        )


def _message(owner: str, name: str, shape: tuple[int, ...], spec: list[str]) -> str:
    fix = (
        "wrap the call in jax.vmap."
        if len(shape) > len(spec)
        else f"add the missing axes, e.g. with {name}[None], or leave out a jax.vmap."
    )
    return (
        f"{owner} takes one example: {name} has {len(shape)} axes {shape} but must be "
        f"[{', '.join(spec)}]; {fix}"
    )
