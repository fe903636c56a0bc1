from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ..nn import DropPath, LayerScale
from ..nn._dropout import apply_dropout

Norm = Callable[[Array], Array]
Branch = Callable[[Array, PRNGKeyArray | None], tuple[Array, Any]]
"""`(x, key) -> (y, anything)`."""


class Residual(eqx.Module):
    """The wiring of one residual branch: where norms, dropout and scales go.

        x + drop_path(scale(dropout(branch_norm(branch(norm(x))))))     then output_norm of that

    Whatever is `None` is left out. With `norm` alone this is the pre-norm layout (Xiong et al.,
    2020), with `output_norm` alone the post-norm one (Vaswani et al., 2017), with `norm` and
    `branch_norm` the sandwich of Gemma 2 (2024), with `branch_norm` alone that of OLMo 2 (2025).
    """

    norm: Norm | None
    branch_norm: Norm | None
    output_norm: Norm | None
    scale: LayerScale | None
    dropout: eqx.nn.Dropout
    drop_path: DropPath | None

    def __init__(
        self,
        norm: Norm | None = None,
        *,
        branch_norm: Norm | None = None,
        output_norm: Norm | None = None,
        scale: LayerScale | None = None,
        dropout_rate: float = 0.0,
        drop_path: DropPath | None = None,
    ):
        """Arguments:

        - `norm`, `branch_norm`, `output_norm`: applied to the input of the branch, to its output,
            and to the sum; `[seq, d_model]`.
        - `scale`: learned factors on the branch.
        - `dropout_rate`: the probability with which an element of the branch is dropped.
        - `drop_path`: drops the whole branch.

        Raises:

        - `ValueError` if `dropout_rate` is out of range.
        """
        if not 0 <= dropout_rate < 1:
            raise ValueError(
                f"Residual: dropout_rate={dropout_rate} must be at least 0 and below 1."
            )
        self.norm = norm
        self.branch_norm = branch_norm
        self.output_norm = output_norm
        self.scale = scale
        self.dropout = eqx.nn.Dropout(dropout_rate)
        self.drop_path = drop_path

    def __call__(
        self,
        x: Float[Array, "seq d_model"],
        branch: Branch,
        *,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "seq d_model"], Any]:
        """Adds a branch to `x`.

        Arguments:

        - `x`: what the branch is added to.
        - `branch`: `(x, key) -> (y, aux)`.
        - `key`: for the branch, dropout and drop path.

        Returns:

        The sum, and the `aux` that the branch returned.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        h, aux = branch(x if self.norm is None else self.norm(x), keys[0])
        if self.branch_norm is not None:
            h = self.branch_norm(h)
        h = apply_dropout("Residual", self.dropout, h, keys[1])
        if self.scale is not None:
            h = self.scale(h)
        if self.drop_path is not None:
            h = self.drop_path(h, key=keys[2])
        x = x + h
        return x if self.output_norm is None else self.output_norm(x), aux
