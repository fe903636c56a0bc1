"""Checks that configurations have in common."""

from typing import Any

from ._config import AbstractConfig


def check_arguments(owner: str, config: Any, kind: type[Any], key: Any) -> None:
    """Checks the arguments of a model's constructor."""
    if not isinstance(config, kind):
        given = f"a {type(config).__name__}"
        if isinstance(config, type):
            given = f"the class {config.__name__}"
        raise ValueError(f"{owner}: config is {given} but must be a {kind.__name__}.")
    if isinstance(key, int):
        raise ValueError(f"{owner}: key={key} is a number; use jax.random.key({key}).")
    if not hasattr(key, "dtype"):
        raise ValueError(
            f"{owner}: key is a {type(key).__name__}; make one, e.g. with jax.random.key(0)."
        )


def check_cache(owner: str, cache: Any, kind: type[Any]) -> None:
    """Checks that a cache is one of this kind of model, and of one example."""
    if not isinstance(cache, kind):
        raise ValueError(
            f"{owner}: cache is a {type(cache).__name__} but must be a {kind.__name__}; make it "
            "with init_cache of this model."
        )
    if cache.length.ndim:
        raise ValueError(
            f"{owner} takes one example: the cache is a batch of {cache.length.shape}; wrap the "
            "call in jax.vmap, over tokens and cache."
        )


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    return (size, size) if isinstance(size, int) else size


def check_sizes(config: AbstractConfig, *names: str) -> None:
    """Checks counts that must be at least one, or `None`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(config).__name__}: {name}={value} must be at least 1.")


def check_not_negative(config: AbstractConfig, *names: str) -> None:
    """Checks counts that may be zero."""
    for name in names:
        value = getattr(config, name)
        if value < 0:
            raise ValueError(f"{type(config).__name__}: {name}={value} must not be negative.")


def check_positive(config: AbstractConfig, *names: str) -> None:
    """Checks numbers that must be positive, or `None`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{type(config).__name__}: {name}={value} must be positive.")


def check_rates(config: AbstractConfig, *names: str) -> None:
    """Checks probabilities of being dropped."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(
                f"{type(config).__name__}: {name}={value} must be at least 0 and below 1."
            )


def check_token_ids(config: AbstractConfig, vocab_size: int, *names: str) -> None:
    """Checks what must be a token id, or `None`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < vocab_size:
            raise ValueError(
                f"{type(config).__name__}: {name}={value} must be a token id, from 0 to vocab_size "
                f"- 1 = {vocab_size - 1}; None if there is no such token."
            )


def check_image(
    config: AbstractConfig, image_size: int | tuple[int, int], patch_size: int | tuple[int, int]
) -> None:
    """Checks that patches divide images."""
    owner = type(config).__name__
    for name, size in (("image_size", image_size), ("patch_size", patch_size)):
        if min(pair(size)) < 1:
            raise ValueError(f"{owner}: {name}={size} must be at least 1.")
    for image, patch in zip(pair(image_size), pair(patch_size), strict=True):
        if image % patch:
            raise ValueError(
                f"{owner}: image_size={image_size} is not a multiple of patch_size={patch_size}; "
                f"{image // patch * patch + patch} would be."
            )


def check_heads(config: AbstractConfig, num_kv_heads: int | None, head_dim: int | None) -> int:
    """Checks that heads divide what they must, and returns the size of one."""
    owner, d_model, num_heads = type(config).__name__, *_widths(config)
    if head_dim is None and d_model % num_heads:
        raise ValueError(
            f"{owner}: d_model={d_model} is not a multiple of num_heads={num_heads}; change one, "
            "or give head_dim."
        )
    if num_kv_heads is not None and num_heads % num_kv_heads:
        raise ValueError(
            f"{owner}: num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}; "
            "every key head must serve the same number of query heads."
        )
    return d_model // num_heads if head_dim is None else head_dim


def _widths(config: AbstractConfig) -> tuple[int, int]:
    fields = config.to_dict()
    return fields["d_model"], fields["num_heads"]
