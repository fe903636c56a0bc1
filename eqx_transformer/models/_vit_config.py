import dataclasses
from typing import Literal

from ..attention import Implementation
from ..stacks import Layout
from ._checks import (
    check_heads,
    check_image,
    check_not_negative,
    check_positive,
    check_rates,
    check_sizes,
    pair,
)
from ._config import AbstractConfig
from ._vocabulary import GATED, Activation


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig(AbstractConfig):
    """The numbers that make a `VisionTransformer`.

    The defaults are ViT-B/16 (Dosovitskiy et al., 2021) without a head.

    Arguments:

    - `image_size`: height and width of the images, or one number for both. Images of other sizes
        can be given as well; see `positions`.
    - `patch_size`: height and width of a patch, or one number for both.
    - `num_channels`: how many channels images have.
    - `num_classes`: how many scores the head gives; `None` for no head.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `num_heads`: how many query heads.
    - `num_kv_heads`: how many key and value heads; `None` for `num_heads`.
    - `head_dim`: size of a head; `None` for `d_model / num_heads`.
    - `d_ff`: size inside the MLPs; `None` for `4 * d_model`, or two thirds of that, rounded up to a
        multiple of 8, where the activation has a gate, which adds a third matrix.
    - `class_token`: whether the sequence begins with a learned token that stands for the image.
    - `distillation_token`: whether there is a second one, with a head of its own (DeiT: Touvron et
        al., 2021). The scores are then the mean of those of the two heads.
    - `num_registers`: how many learned tokens come after these, whose outputs are not used
        (Darcet et al., Vision Transformers Need Registers, 2024).
    - `pooling`: the vector that represents the image: the class token (`"first"`), the mean of the
        patches, or attention to the patches from a learned query (`"attention"`).
    - `positions`: how the model knows where patches are. `"learned"`: by a vector for each, which
        is interpolated for images of another size. `"sinusoidal"`: by a fixed vector. `"rope"`: by
        rotated queries and keys. `"none"`: not at all.
    - `interpolation`: how learned vectors are interpolated; see `bicubic_matrix`.
    - `rope_theta`: ratio of the wavelengths of `positions="rope"`.
    - `relative_bias`: whether attention scores have a learned bias for each offset in rows and
        columns (BEiT: Bao et al., 2022), which is interpolated for images of another size.
    - `share_relative_bias`: whether all blocks share one such bias.
    - `window`: how many rows and columns in each direction a patch sees, its own included; `None`
        for all. Tokens that are not patches see all, and are seen by all.
    - `dropout_rate`: the probability with which an element of an embedding or of a residual branch,
        or an attention weight, is dropped.
    - `drop_path_rate`: the probability with which the last block's branches are dropped; that of
        the others grows linearly from 0.
    - `layout`: where the norms are.
    - `norm`: which kind they are.
    - `norm_eps`: added to the variance or mean square; ignored for `"dynamic_tanh"`.
    - `embedding_norm`: whether there is a norm before the first block (CLIP).
    - `final_norm`: of every token after the last block, of the pooled vector alone (BEiT), or none.
    - `pooler`: whether the pooled vector goes through a linear map and `tanh`.
    - `activation`: the nonlinearity of the MLPs; see `Activation`.
    - `use_bias`: whether projections of attention and MLPs have biases.
    - `qkv_bias`: whether those of queries, keys and values have; `None` for `use_bias`.
    - `k_bias`: whether that of keys has; `None` for `qkv_bias`.
    - `patch_bias`: whether the embedding of patches has a bias.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `layer_scale`: initial factor of the learned scale of each branch; `None` for no scale.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    - `attention_block_size`: tile size of attention; `None` chooses.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input, and the results of attention and of products with weights.
    - `unroll`: how many blocks make one iteration of the loop over depth.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    num_channels: int = 3
    num_classes: int | None = None
    d_model: int = 768
    num_layers: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    class_token: bool = True
    distillation_token: bool = False
    num_registers: int = 0
    pooling: Literal["first", "mean", "attention"] = "first"
    positions: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    interpolation: Literal["bicubic", "bicubic_antialias"] = "bicubic"
    rope_theta: float = 100.0
    relative_bias: bool = False
    share_relative_bias: bool = False
    window: int | None = None
    dropout_rate: float = 0.0
    drop_path_rate: float = 0.0
    layout: Layout = "pre"
    norm: Literal["layer", "rms", "dynamic_tanh"] = "layer"
    norm_eps: float = 1e-6
    embedding_norm: bool = False
    final_norm: Literal["tokens", "pooled", "none"] = "tokens"
    pooler: bool = False
    activation: Activation = "gelu"
    use_bias: bool = True
    qkv_bias: bool | None = None
    k_bias: bool | None = None
    patch_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    attention_implementation: Implementation | None = None
    attention_block_size: int | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """The height and the width of an image, in patches."""
        (height, width), (rows, columns) = self.image_shape, self.patch_shape
        return height // rows, width // columns

    @property
    def num_prefix(self) -> int:
        """How many tokens come before the patches."""
        return self.class_token + self.distillation_token + self.num_registers

    @property
    def inner_size(self) -> int:
        """Size inside the MLPs."""
        if self.d_ff is not None:
            return self.d_ff
        if self.activation in GATED:
            return (4 * self.d_model * 2 // 3 + 7) // 8 * 8
        return 4 * self.d_model

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("num_channels", "num_classes", "d_model", "num_layers", "num_heads", "num_kv_heads"),
            *("head_dim", "d_ff", "window", "attention_block_size", "unroll"),
        )
        check_positive(self, "rope_theta", "norm_eps", "layer_scale")
        check_rates(self, "dropout_rate", "drop_path_rate")
        check_image(self, self.image_size, self.patch_size)
        head_dim = check_heads(self, self.num_kv_heads, self.head_dim)
        check_not_negative(self, "num_registers")
        if self.positions == "sinusoidal" and self.d_model % 4:
            raise ValueError(
                f"ViTConfig: positions='sinusoidal' has pairs of features for rows and for "
                f"columns, so d_model={self.d_model} must be a multiple of 4."
            )
        if self.positions == "rope" and (head_dim % 2 or head_dim < 4):
            raise ValueError(
                f"ViTConfig: positions='rope' rotates pairs of features by rows and by columns, so "
                f"head_dim={head_dim} must be even and at least 4."
            )
        if self.pooling == "first" and not self.class_token:
            raise ValueError(
                "ViTConfig: pooling='first' takes the class token, but class_token=False; use "
                "'mean' or 'attention'."
            )
        if self.distillation_token and not (self.class_token and self.pooling == "first"):
            raise ValueError(
                f"ViTConfig: distillation_token=True goes with a class token that is pooled, but "
                f"class_token={self.class_token} and pooling={self.pooling!r}."
            )
        if self.share_relative_bias and not self.relative_bias:
            raise ValueError(
                "ViTConfig: share_relative_bias=True needs relative_bias=True; there is no bias."
            )
        if self.distillation_token and self.pooler and self.num_classes is not None:
            raise ValueError(
                "ViTConfig: distillation_token=True applies the heads to the tokens themselves; "
                "leave out pooler=True."
            )
