import dataclasses
import functools
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import Implementation
from ..nn import (
    MLP,
    AbstractLinear,
    Attention,
    AxialRoPE,
    Embedding,
    LayerNorm,
    Linear,
    Modulation,
    PatchEmbedding,
    TimestepEmbedding,
    grid_coordinates,
    modulate,
    unpatchify,
)
from ..stacks import Condition, Residual, Stack, TransformerBlock
from ._checks import (
    check_arguments,
    check_heads,
    check_image,
    check_positive,
    check_rates,
    check_sizes,
    pair,
)
from ._config import AbstractConfig
from ._vit import sinusoidal_grid
from ._vocabulary import REMAT, attention_fn_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(AbstractConfig):
    """The numbers that make a `DiT`.

    Arguments:

    - `image_size`: height and width of the images, or one number for both.
    - `patch_size`: height and width of a patch, or one number for both.
    - `num_channels`: how many channels images have.
    - `out_channels`: how many channels the output has; `None` for `num_channels`.
    - `num_classes`: how many classes there are to condition on; `None` for no such condition.
    - `class_dropout_rate`: the probability with which, in training, the class is withheld, so that
        the model is an unconditional one too (Ho and Salimans, 2022).
    - `time_scale`: the factor on times before their sinusoids are taken. Diffusion models count
        time in steps, up to 1000; for times from 0 to 1 use 1000.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `num_heads`: how many heads.
    - `d_ff`: size inside the MLPs; `None` for `4 * d_model`.
    - `positions`: how the model knows where patches are: by a fixed vector, or by rotated queries
        and keys.
    - `rope_theta`: ratio of the wavelengths of `positions="rope"`.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `norm_eps`: added to the variance in norms.
    - `dropout_rate`: the probability with which an element of a residual branch, or an attention
        weight, is dropped.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input, and the results of attention and of products with weights.
    - `unroll`: how many blocks make one iteration of the loop over depth.
    """

    image_size: int | tuple[int, int] = 32
    patch_size: int | tuple[int, int] = 2
    num_channels: int = 4
    out_channels: int | None = None
    num_classes: int | None = 1000
    class_dropout_rate: float = 0.1
    time_scale: float = 1.0
    d_model: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    d_ff: int | None = None
    positions: Literal["sinusoidal", "rope"] = "sinusoidal"
    rope_theta: float = 100.0
    qk_norm: bool = False
    norm_eps: float = 1e-6
    dropout_rate: float = 0.0
    attention_implementation: Implementation | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("num_channels", "out_channels", "num_classes", "d_model", "num_layers", "num_heads"),
            *("d_ff", "unroll"),
        )
        check_positive(self, "rope_theta", "norm_eps", "time_scale")
        check_rates(self, "class_dropout_rate", "dropout_rate")
        check_image(self, self.image_size, self.patch_size)
        head_dim = check_heads(self, None, None)
        if self.positions == "sinusoidal" and self.d_model % 4:
            raise ValueError(
                f"DiTConfig: positions='sinusoidal' has pairs of features for rows and for "
                f"columns, so d_model={self.d_model} must be a multiple of 4."
            )
        if self.positions == "rope" and (head_dim % 2 or head_dim < 4):
            raise ValueError(
                f"DiTConfig: positions='rope' rotates pairs of features by rows and by columns, so "
                f"head_dim={head_dim} must be even and at least 4."
            )


class DiT(eqx.Module):
    """A diffusion transformer: from a noisy image and a time to an image, given a class.

    Every block is modulated by the sum of the vectors of the time and the class, through scales,
    shifts and gates that are initially zero: at first the output is zero, whatever the input. What
    the output means (noise, velocity, the clean image) is up to the training.
    (Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.)

    Images are `[channels, height, width]`, of any size that patches divide.
    """

    config: DiTConfig = eqx.field(static=True)
    patch_embedding: PatchEmbedding
    time_embedding: TimestepEmbedding
    class_embedding: Embedding | None
    stack: Stack
    norm: LayerNorm
    modulation: Modulation
    head: AbstractLinear
    inference: bool

    def __init__(self, config: DiTConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("DiT", config, DiTConfig, key)
        keys = jax.random.split(key, 6)
        d_model, patch_shape = config.d_model, pair(config.patch_size)
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.num_channels, d_model, patch_shape, key=keys[0]
        )
        self.time_embedding = TimestepEmbedding(d_model, key=keys[1])
        self.class_embedding = None
        if config.num_classes is not None:
            # The last row stands for no class.
            self.class_embedding = Embedding(
                config.num_classes + 1,
                d_model,
                init=jax.nn.initializers.normal(0.02),
                key=keys[2],
            )
        self.stack = Stack(
            functools.partial(_make_block, config),
            config.num_layers,
            remat=REMAT[config.remat],
            unroll=min(config.unroll, config.num_layers),
            key=keys[3],
        )
        self.norm = LayerNorm(d_model, eps=config.norm_eps, use_weight=False, use_bias=False)
        self.modulation = Modulation(d_model, d_model, 2, key=keys[4])
        channels = config.num_channels if config.out_channels is None else config.out_channels
        self.head = Linear(
            d_model,
            channels * patch_shape[0] * patch_shape[1],
            use_bias=True,
            init=jax.nn.initializers.zeros,
            key=keys[5],
        )
        self.inference = False

    @jax.named_scope("eqx_transformer.models.DiT")
    @unbatched(image="channels height width")
    def __call__(
        self,
        image: Float[Array, "channels height width"],
        time: Float[Array, ""],
        label: Int[Array, ""] | None = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "out_channels height width"]:
        """The output for one image at one time.

        Arguments:

        - `image`: channels first.
        - `time`: a number.
        - `label`: the class, from 0 to `num_classes - 1`; unconditional if not given.
        - `key`: for dropout, and for dropping the class in training; needed if there is any, unless
            switched off by `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if the image has other channels, or patches do not divide it, or there is a
            label but there are no classes.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        config = self.config
        grid = self.patch_embedding.grid(image)
        x = self.patch_embedding(image)
        coordinates = None
        if config.positions == "rope":
            coordinates = grid_coordinates(grid, accumulation_dtype(x.dtype))
        else:
            x = x + sinusoidal_grid(grid, config.d_model, x)
        vector = self.time_embedding(time * config.time_scale).astype(x.dtype)
        told = self._class_vector(label, keys[0])
        if told is not None:
            vector = vector + told.astype(x.dtype)
        x = self.stack(x, context=Condition(coordinates, vector), key=keys[1])
        shift, scale = self.modulation(vector)
        x = self.head(modulate(self.norm(x), shift, scale))
        _, height, width = image.shape
        return unpatchify(x, (height, width), pair(config.patch_size))

    def _class_vector(
        self, label: Int[Array, ""] | None, key: PRNGKeyArray | None
    ) -> Float[Array, " d_model"] | None:
        num_classes, rate = self.config.num_classes, self.config.class_dropout_rate
        if self.class_embedding is None or num_classes is None:
            if label is not None:
                raise ValueError(
                    "DiT: there is a label, but num_classes=None; leave it out, or build the "
                    "model with classes."
                )
            return None
        if label is None:
            return self.class_embedding(jnp.asarray(num_classes, jnp.int32))
        # The embedding's row for no class must not be taken for one more class.
        label = jnp.where(label == num_classes, -1, label)
        if rate > 0 and not self.inference:
            if key is None:
                raise RuntimeError(
                    f"DiT: class_dropout_rate={rate} needs a key; pass key=, or switch it off with "
                    "eqx.nn.inference_mode(model)."
                )
            label = jnp.where(jax.random.bernoulli(key, rate), num_classes, label)
        return self.class_embedding(label)


def _make_block(config: DiTConfig, *, key: PRNGKeyArray) -> TransformerBlock:
    attention_key, mlp_key, modulation_key = jax.random.split(key, 3)
    d_model = config.d_model
    attention = Attention(
        d_model,
        config.num_heads,
        rope=AxialRoPE(theta=config.rope_theta) if config.positions == "rope" else None,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        use_bias=True,
        dropout_rate=config.dropout_rate,
        attention_fn=attention_fn_of(config.attention_implementation),
        key=attention_key,
    )
    d_ff = 4 * d_model if config.d_ff is None else config.d_ff
    # Scales and shifts come from the modulation, so norms have none of their own.
    norm = LayerNorm(d_model, eps=config.norm_eps, use_weight=False, use_bias=False)
    return TransformerBlock(
        attention,
        MLP(d_model, d_ff, key=mlp_key),
        Residual(norm, dropout_rate=config.dropout_rate),
        Residual(norm, dropout_rate=config.dropout_rate),
        Modulation(d_model, d_model, 6, key=modulation_key),
    )
