import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._precision import accumulation_dtype
from .._unbatched import unbatched
from ..attention import AbstractMask, GridBias, GridWindow
from ..nn import (
    MLP,
    AbstractLinear,
    Attention,
    AttentionPooling,
    AxialRoPE,
    CrossAttention,
    GatedMLP,
    Linear,
    PatchEmbedding,
    PositionGrid,
    SinusoidalCoordinates,
    grid_coordinates,
)
from ..nn._dropout import apply_dropout
from ..stacks import (
    AbstractBlock,
    BiasedStack,
    Condition,
    Stack,
    attention_maps,
    encoder_block,
    hidden_states,
    linear_drop_path,
)
from ._checks import check_arguments
from ._encoder import pool
from ._vit_config import ViTConfig
from ._vocabulary import ACTIVATIONS, GATED, REMAT, attention_fn_of, norm_of


class ImageTokens(eqx.Module):
    """The encoding of an image by a `VisionTransformer`: one vector for every token.

    - `prefix`: those of tokens that are not patches: class token, distillation token, registers.
    - `patches`: those of the patches, row by row.
    - `kept`: which patches these are, where some were dropped; `None` for all.
    """

    prefix: Float[Array, "prefix d_model"]
    patches: Float[Array, "patches d_model"]
    kept: Int[Array, " patches"] | None

    @property
    def all(self) -> Float[Array, "seq d_model"]:
        """All tokens in the order of the model: the prefix, then the patches."""
        return jnp.concatenate([self.prefix, self.patches])


class _Input(eqx.Module):
    """The input of the first block, the blocks, and the options that all of them are given."""

    x: Float[Array, "seq d_model"]
    kept: Int[Array, " patches"] | None
    stack: Any
    options: dict[str, Any]


class VisionTransformer(eqx.Module):
    """A transformer that reads an image, cut into patches.

    The published families are settings of its configuration: ViT (Dosovitskiy et al., 2021), DeiT
    (Touvron et al., 2021), BEiT (Bao et al., 2022), DINOv2 (Oquab et al., 2023), with registers
    (Darcet et al., 2024), DINOv3 (Siméoni et al., 2025), and the image towers of CLIP and SigLIP.

    Images are `[channels, height, width]`, of any size that patches divide.
    """

    config: ViTConfig = eqx.field(static=True)
    patch_embedding: PatchEmbedding
    class_token: Float[Array, " d_model"] | None
    distillation_token: Float[Array, " d_model"] | None
    registers: Float[Array, "registers d_model"] | None
    positions: PositionGrid | None
    embedding_norm: Any
    dropout: eqx.nn.Dropout
    stack: Stack | BiasedStack
    norm: Any
    pooling: AttentionPooling | None
    pooler: AbstractLinear | None
    head: AbstractLinear | None
    distillation_head: AbstractLinear | None

    def __init__(self, config: ViTConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("VisionTransformer", config, ViTConfig, key)
        keys = iter(jax.random.split(key, 10))
        d_model = config.d_model
        self.config = config
        self.patch_embedding = PatchEmbedding(
            config.num_channels,
            d_model,
            config.patch_shape,
            use_bias=config.patch_bias,
            key=next(keys),
        )
        init = jax.nn.initializers.truncated_normal(0.02)
        class_key, distillation_key, registers_key, positions_key = (next(keys) for _ in range(4))
        self.class_token = init(class_key, (d_model,)) if config.class_token else None
        self.distillation_token = None
        if config.distillation_token:
            self.distillation_token = init(distillation_key, (d_model,))
        self.registers = None
        if config.num_registers:
            self.registers = init(registers_key, (config.num_registers, d_model))
        self.positions = None
        if config.positions == "learned":
            self.positions = PositionGrid(
                config.grid,
                d_model,
                num_prefix=config.num_prefix - config.num_registers,
                antialias=config.interpolation == "bicubic_antialias",
                key=positions_key,
            )
        self.embedding_norm = _make_norm(config, d_model) if config.embedding_norm else None
        self.dropout = eqx.nn.Dropout(config.dropout_rate)
        stack = Stack(
            functools.partial(_make_block, config),
            config.num_layers,
            remat=REMAT[config.remat],
            unroll=min(config.unroll, config.num_layers),
            key=next(keys),
        )
        if config.drop_path_rate > 0:
            stack = linear_drop_path(stack, config.drop_path_rate)
        self.stack = stack
        if config.share_relative_bias:
            self.stack = BiasedStack(stack, _make_bias(config))
        self.norm = _make_norm(config, d_model) if config.final_norm != "none" else None
        pooling_key, pooler_key, head_key, other_head_key = (next(keys) for _ in range(4))
        self.pooling = None
        if config.pooling == "attention":
            self.pooling = _make_pooling(config, key=pooling_key)
        self.pooler = None
        if config.pooler:
            self.pooler = Linear(d_model, d_model, use_bias=True, key=pooler_key)
        self.head = self.distillation_head = None
        if config.num_classes is not None:
            self.head = Linear(d_model, config.num_classes, use_bias=True, key=head_key)
            if config.distillation_token:
                self.distillation_head = Linear(
                    d_model, config.num_classes, use_bias=True, key=other_head_key
                )

    @jax.named_scope("eqx_transformer.models.VisionTransformer")
    @unbatched(image="channels height width")
    def __call__(
        self, image: Float[Array, "channels height width"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " features"]:
        """The scores of the classes, or, without a head, the vector of the image.

        Arguments:

        - `image`: channels first.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if the image has other channels, or patches do not divide it.
        """
        keys = (None, None) if key is None else jax.random.split(key)
        tokens = self.encode(image, key=keys[0])
        x = self.pool(tokens, key=keys[1])
        if self.head is None:
            return x
        scores = self.head(x)
        if self.distillation_head is not None:
            # The class token is the first, the distillation token the second.
            scores = (scores + self.distillation_head(tokens.prefix[1])) / 2
        return scores

    @unbatched(image="channels height width")
    def encode(
        self,
        image: Float[Array, "channels height width"],
        *,
        keep: int | Int[Array, " patches"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> ImageTokens:
        """One vector for every token.

        Arguments:

        - `image`: channels first.
        - `keep`: how many patches to keep, chosen at random, or the indices of those to keep, row
            by row; all if not given. Dropped patches are not computed (He et al., Masked
            Autoencoders Are Scalable Vision Learners, 2022).
        - `key`: for the choice, and for dropout.

        Raises:

        - `ValueError` if the image or `keep` does not fit.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        start = self._embed(image, keep, keys[0], keys[1])
        x = start.stack(start.x, key=keys[2], **start.options)
        if self.norm is not None and self.config.final_norm == "tokens":
            x = self.norm(x)
        num_prefix = self.config.num_prefix
        return ImageTokens(x[:num_prefix], x[num_prefix:], start.kept)

    def pool(
        self, tokens: ImageTokens, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, " d_model"]:
        """The vector of an image, from what `encode` returned; `key` is for dropout."""
        if self.pooling is not None:
            x = self.pooling(tokens.patches, key=key)
        elif self.config.pooling == "first":
            x = tokens.prefix[0]
        else:
            x = pool(tokens.patches, how="mean")
        if self.norm is not None and self.config.final_norm == "pooled":
            x = self.norm(x)
        return x if self.pooler is None else jnp.tanh(self.pooler(x))

    @unbatched(image="channels height width")
    def hidden_states(
        self, image: Float[Array, "channels height width"]
    ) -> Float[Array, "states seq d_model"]:
        """The input of the first block, and the output of each, without the final norm.

        `model.norm` can be applied to the result directly. Dropout must be switched off.
        """
        start = self._embed(image, None, None, None)
        return hidden_states(start.stack, start.x, **start.options)

    @unbatched(image="channels height width")
    def attention_maps(
        self, image: Float[Array, "channels height width"]
    ) -> Float[Array, "layers heads seq seq"]:
        """How much every token attends to every other, in all layers and heads.

        Tokens that are not patches come first. Dropout must be switched off.
        """
        start = self._embed(image, None, None, None)
        return attention_maps(start.stack, start.x, **start.options)

    def _embed(
        self,
        image: Float[Array, "channels height width"],
        keep: int | Int[Array, " patches"] | None,
        keep_key: PRNGKeyArray | None,
        dropout_key: PRNGKeyArray | None,
    ) -> _Input:
        config = self.config
        grid = self.patch_embedding.grid(image)
        patches = self.patch_embedding(image)
        tokens = [x for x in (self.class_token, self.distillation_token) if x is not None]
        prefix = jnp.zeros((0, config.d_model), patches.dtype)
        if tokens:
            prefix = jnp.stack(tokens).astype(patches.dtype)
        if self.positions is not None:
            positions = self.positions(grid).astype(patches.dtype)
            prefix = prefix + positions[: len(tokens)]
            patches = patches + positions[len(tokens) :]
        elif config.positions == "sinusoidal":
            patches = patches + sinusoidal_grid(grid, config.d_model, patches)
        # Registers have no position in the image.
        if self.registers is not None:
            prefix = jnp.concatenate([prefix, self.registers.astype(prefix.dtype)])
        coordinates = None
        if config.positions == "rope":
            coordinates = grid_coordinates(grid, accumulation_dtype(patches.dtype))

        kept = positions = None
        if keep is not None:
            kept = _choose(keep, grid[0] * grid[1], keep_key)
            patches = patches[kept]
            coordinates = None if coordinates is None else coordinates[kept]
            before = jnp.arange(config.num_prefix, dtype=jnp.int32)
            positions = jnp.concatenate([before, config.num_prefix + kept.astype(jnp.int32)])
        context = None
        if coordinates is not None:
            # Tokens that are not patches have no position: at the origin nothing is rotated.
            nowhere = ((config.num_prefix, 0), (0, 0))
            context = Condition(coordinates=jnp.pad(coordinates, nowhere))
        mask: AbstractMask | None = None
        if config.window is not None:
            mask = GridWindow(grid[1], config.window - 1, config.num_prefix)

        x = jnp.concatenate([prefix, patches])
        x = x if self.embedding_norm is None else self.embedding_norm(x)
        x = apply_dropout("VisionTransformer", self.dropout, x, dropout_key)
        options = {"context": context, "mask": mask, "positions": positions}
        return _Input(x, kept, self._stack_for(grid), options)

    def _stack_for(self, grid: tuple[int, int]) -> Any:
        """The blocks, with biases for a grid."""
        stack = self.stack.spread() if isinstance(self.stack, BiasedStack) else self.stack
        if not self.config.relative_bias or grid == self.config.grid:
            return stack
        return eqx.tree_at(
            lambda stack: stack.blocks.attention.score_mod,
            stack,
            replace_fn=eqx.filter_vmap(lambda bias: bias.resized(grid)),
        )


def sinusoidal_grid(
    grid: tuple[int, int], d_model: int, like: Float[Array, "patches d_model"]
) -> Float[Array, "patches d_model"]:
    """The fixed position vectors of MAE and DiT, in which columns come before rows."""
    rows, columns = jnp.meshgrid(*(jnp.arange(float(n)) for n in grid), indexing="ij")
    places = jnp.stack([columns.ravel(), rows.ravel()], axis=-1)
    return SinusoidalCoordinates(2, d_model)(places, like.dtype)


def _choose(
    keep: int | Int[Array, " patches"], num_patches: int, key: PRNGKeyArray | None
) -> Int[Array, " patches"]:
    if not isinstance(keep, int):
        return keep
    if not 1 <= keep <= num_patches:
        raise ValueError(
            f"VisionTransformer: keep={keep} must be at least 1 and at most the number of patches, "
            f"{num_patches}."
        )
    if key is None:
        raise RuntimeError(
            f"VisionTransformer: keep={keep} chooses patches at random, which needs a key; pass "
            "key=, or which patches to keep."
        )
    return jnp.sort(jax.random.permutation(key, num_patches)[:keep])


def _make_norm(config: ViTConfig, size: int) -> Any:
    return norm_of(config.norm, size, eps=config.norm_eps)


def _make_bias(config: ViTConfig) -> GridBias:
    return GridBias(config.grid, config.num_heads, num_prefix=config.num_prefix)


def _make_block(config: ViTConfig, *, key: PRNGKeyArray) -> AbstractBlock:
    attention_key, block_key = jax.random.split(key)
    bias = None
    if config.relative_bias and not config.share_relative_bias:
        bias = _make_bias(config)
    attention = Attention(
        config.d_model,
        config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rope=AxialRoPE(theta=config.rope_theta) if config.positions == "rope" else None,
        qk_norm=config.qk_norm,
        norm_eps=config.norm_eps,
        score_mod=bias,
        use_bias=config.use_bias,
        qkv_bias=config.qkv_bias,
        k_bias=config.k_bias,
        dropout_rate=config.dropout_rate,
        attention_fn=attention_fn_of(config.attention_implementation, config.attention_block_size),
        key=attention_key,
    )
    return encoder_block(
        config.d_model,
        config.num_heads,
        config.inner_size,
        attention=attention,
        layout=config.layout,
        make_norm=functools.partial(_make_norm, config),
        activation=ACTIVATIONS[config.activation],
        gated=config.activation in GATED,
        use_bias=config.use_bias,
        dropout_rate=config.dropout_rate,
        layer_scale=config.layer_scale,
        drop_path_rate=0.0 if config.drop_path_rate > 0 else None,
        key=block_key,
    )


def _make_pooling(config: ViTConfig, *, key: PRNGKeyArray) -> AttentionPooling:
    attention_key, mlp_key, query_key = jax.random.split(key, 3)
    attention = CrossAttention(
        config.d_model,
        config.num_heads,
        use_bias=config.use_bias,
        dropout_rate=config.dropout_rate,
        key=attention_key,
    )
    mlp = (GatedMLP if config.activation in GATED else MLP)(
        config.d_model,
        config.inner_size,
        activation=ACTIVATIONS[config.activation],
        use_bias=config.use_bias,
        key=mlp_key,
    )
    return AttentionPooling(attention, _make_norm(config, config.d_model), mlp, key=query_key)
