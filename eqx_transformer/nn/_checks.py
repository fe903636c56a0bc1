"""Checks that layers have in common."""

import math


def check_positive(owner: str, name: str, value: float | int) -> None:
    """Checks a number that must be positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{owner}: {name}={value} must be positive and finite.")


def check_rate(owner: str, name: str, value: float | int) -> None:
    """Checks a probability of being dropped."""
    if not 0 <= value < 1:
        raise ValueError(f"{owner}: {name}={value} must be at least 0 and below 1.")
