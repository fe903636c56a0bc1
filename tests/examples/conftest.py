"""The programs run with JAX's own settings, as they do for a user."""

import pytest


@pytest.fixture(autouse=True)
def _settings(settings_of_a_user: None) -> None:
    """In every test of this folder."""
