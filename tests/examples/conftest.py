"""The programs run with JAX's own settings, as they do for a user."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def settings_of_a_user() -> Iterator[None]:
    """Optax's optimisers rely on implicit promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
