"""Images as sequences of patches, and back."""

import equinox as eqx
import jax
from jaxtyping import Array, DTypeLike, Float, PRNGKeyArray

from .._unbatched import unbatched
from ._linear import AbstractLinear, Linear


def patchify(
    image: Float[Array, "channels height width"], patch_size: tuple[int, int]
) -> Float[Array, "patches features"]:
    """Cuts an image into patches, row by row.

    Features of a patch are ordered as the weights of a convolution are: channel, row, column.

    Arguments:

    - `image`: channels first.
    - `patch_size`: height and width of a patch.

    Raises:

    - `ValueError` if patches do not divide the image.
    """
    channels, height, width = image.shape
    rows, columns = grid_size((height, width), patch_size)
    x = image.reshape(channels, rows, patch_size[0], columns, patch_size[1])
    return x.transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)


def unpatchify(
    patches: Float[Array, "patches features"],
    image_size: tuple[int, int],
    patch_size: tuple[int, int],
) -> Float[Array, "channels height width"]:
    """The image with these patches: the inverse of `patchify`.

    Arguments:

    - `patches`: row by row; features are channel, row, column.
    - `image_size`: height and width of the image.
    - `patch_size`: height and width of a patch.

    Raises:

    - `ValueError` if sizes do not fit.
    """
    rows, columns = grid_size(image_size, patch_size)
    area = patch_size[0] * patch_size[1]
    if patches.shape[0] != rows * columns or patches.shape[1] % area:
        raise ValueError(
            f"unpatchify: patches have shape {patches.shape}, but an image of {image_size} has "
            f"{rows} * {columns} patches with a multiple of {area} features each."
        )
    x = patches.reshape(rows, columns, -1, *patch_size)
    return x.transpose(2, 0, 3, 1, 4).reshape(-1, *image_size)


def grid_size(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """The height and the width of an image, in patches.

    Raises:

    - `ValueError` if patches do not divide the image.
    """
    if min(patch_size) < 1:
        raise ValueError(f"patches of size {patch_size} are empty; give at least 1 for both axes.")
    for name, size, patch in zip(("height", "width"), image_size, patch_size, strict=True):
        if size < patch or size % patch:
            near = max(1, round(size / patch)) * patch
            raise ValueError(
                f"an image of {name} {size} has no whole number of patches of {name} {patch}; "
                f"resize, crop or pad it, e.g. to {near}."
            )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


class PatchEmbedding(eqx.Module):
    """One vector for every patch of an image: a linear map of its pixels.

    It equals the convolution of published models, whose stride is its kernel size and whose weight,
    `[d_model, channels, height, width]`, is the transpose of `proj.weight` with axes merged.
    (Dosovitskiy et al., 2021, equation 1.)
    """

    proj: AbstractLinear
    num_channels: int = eqx.field(static=True)
    patch_size: tuple[int, int] = eqx.field(static=True)

    def __init__(
        self,
        num_channels: int,
        d_model: int,
        patch_size: tuple[int, int],
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        key: PRNGKeyArray,
    ):
        """Arguments:

        - `num_channels`: of the images.
        - `d_model`: size of the vectors.
        - `patch_size`: height and width of a patch.
        - `use_bias`: whether the map has a bias.
        - `dtype`: of the parameters; the default floating dtype if not given.
        - `key`: for the initial weight.
        """
        for name, size in (("num_channels", num_channels), ("patch_size", min(patch_size))):
            if size < 1:
                raise ValueError(f"PatchEmbedding: {name}={size} must be at least 1.")
        features = num_channels * patch_size[0] * patch_size[1]
        self.proj = Linear(features, d_model, use_bias=use_bias, dtype=dtype, key=key)
        self.num_channels = num_channels
        self.patch_size = patch_size

    def grid(self, image: Float[Array, "channels height width"]) -> tuple[int, int]:
        """The height and the width of an image, in patches.

        Raises:

        - `ValueError` if the image has other channels, or patches do not divide it.
        """
        channels, height, width = image.shape
        if channels != self.num_channels:
            hint = "make it the right number, or build the model with another num_channels"
            if width == self.num_channels:
                hint = "channels come first: use jnp.moveaxis(image, -1, 0)"
            raise ValueError(
                f"PatchEmbedding: image has shape {image.shape}, so {channels} channels, but "
                f"num_channels={self.num_channels}; {hint}."
            )
        return grid_size((height, width), self.patch_size)

    @jax.named_scope("eqx_transformer.nn.PatchEmbedding")
    @unbatched(image="channels height width")
    def __call__(
        self,
        image: Float[Array, "channels height width"],
        *,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "patches d_model"]:
        """The vectors of the patches, row by row. `key` is ignored, as in Equinox.

        Raises:

        - `ValueError` if the image has other channels, or patches do not divide it.
        """
        self.grid(image)
        return self.proj(patchify(image, self.patch_size))
