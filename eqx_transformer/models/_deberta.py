import dataclasses
import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .._unbatched import unbatched
from ..attention import Padding
from ..nn import Convolution, DisentangledAttention, Embedding
from ..stacks import AbstractBlock, Stack, StackSequence, encoder_block
from ._checks import check_arguments, check_sizes
from ._config import AbstractConfig
from ._token_embedding import TokenEmbedding
from ._transformer_config import TransformerConfig
from ._transformer_parts import make_norm
from ._vocabulary import ACTIVATIONS, GATED, REMAT, attention_fn_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeBERTaConfig(AbstractConfig):
    """The numbers that make a `DeBERTa`.

    Arguments:

    - `transformer`: what it has in common with a `TransformerEncoder`: sizes, embeddings, norms.
        Its `positions` are those of embeddings, `"none"` in version 3.
    - `max_distance`: see `DisentangledAttention`; `None` for `max_len`.
    - `num_buckets`: how many buckets of distances there are on each side; `None` for one for each
        distance.
    - `content_to_position`, `position_to_content`: which terms scores have, besides that of
        content.
    - `share_projections`: whether the vectors of distances share the projections of queries and
        keys.
    - `relative_norm`: whether there is a norm on the vectors of distances.
    - `convolution_size`: how many positions a convolution beside the first layer sees; `None` for
        no convolution.
    - `convolution_activation`: its nonlinearity.
    """

    transformer: TransformerConfig
    max_distance: int | None = None
    num_buckets: int | None = 256
    content_to_position: bool = True
    position_to_content: bool = True
    share_projections: bool = True
    relative_norm: bool = True
    convolution_size: int | None = None
    convolution_activation: Literal["tanh", "gelu"] = "tanh"

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(self, "max_distance", "num_buckets", "convolution_size")
        numbers = self.transformer
        for name, wanted in (
            ("layout", "post"),
            ("norm", "layer"),
            ("final_norm", False),
            ("use_bias", True),
            ("embedding_norm", True),
            ("attention", "softmax"),
            ("qk_norm", False),
            ("drop_path_rate", 0.0),
            ("pooler", False),
        ):
            if getattr(numbers, name) != wanted:
                raise ValueError(
                    f"DeBERTaConfig: {name}={getattr(numbers, name)!r} of the transformer must be "
                    f"{wanted!r}."
                )
        for name in (
            *("d_embedding", "num_kv_heads", "head_dim", "window", "gate", "query_scale"),
            *("num_experts", "layer_scale", "k_bias"),
        ):
            if getattr(numbers, name) is not None:
                raise ValueError(
                    f"DeBERTaConfig: {name}={getattr(numbers, name)!r} of the transformer has no "
                    "meaning here; leave it out."
                )
        if numbers.positions not in ("learned", "sinusoidal", "sinusoidal_halves", "none"):
            raise ValueError(
                f"DeBERTaConfig: positions={numbers.positions!r} would change attention, which "
                "has relative positions of its own; use 'learned' or 'none'."
            )
        if not (self.content_to_position or self.position_to_content):
            raise ValueError(
                "DeBERTaConfig: content_to_position and position_to_content are both False, and "
                "nothing is left of relative positions; use a TransformerEncoder."
            )

    @property
    def distances(self) -> int:
        """The distance from which on distances are not told apart."""
        return self.transformer.max_len if self.max_distance is None else self.max_distance


class DeBERTa(eqx.Module):
    """An encoder whose attention has separate vectors for content and relative positions.

    Versions 2 and 3. (He et al., DeBERTa, 2021; DeBERTaV3, 2021.)

        relative = relative_norm(relative table)
        x = first layer(embedding)
        x = norm(x + activation(convolution(embedding)))        where there is a convolution
        x = other layers(x)
    """

    config: DeBERTaConfig = eqx.field(static=True)
    embedding: TokenEmbedding
    relative: Embedding
    relative_norm: Any
    stack: StackSequence
    convolution: Convolution | None
    convolution_norm: Any

    def __init__(self, config: DeBERTaConfig, *, key: PRNGKeyArray):
        """Arguments:

        - `config`: the numbers.
        - `key`: for the initial weights.
        """
        check_arguments("DeBERTa", config, DeBERTaConfig, key)
        keys = jax.random.split(key, 5)
        numbers = config.transformer
        d_model = numbers.d_model
        self.config = config
        self.embedding = TokenEmbedding(numbers, key=keys[0])
        half = config.distances if config.num_buckets is None else config.num_buckets
        self.relative = Embedding(2 * half, d_model, key=keys[1])
        self.relative_norm = make_norm(numbers, d_model) if config.relative_norm else None
        stacks = []
        first = 0 if config.convolution_size is None else 1
        for count, stack_key in ((first, keys[2]), (numbers.num_layers - first, keys[3])):
            if count:
                make = functools.partial(_make_block, config)
                unroll = min(numbers.unroll, count)
                options = {"remat": REMAT[numbers.remat], "unroll": unroll}
                stacks.append(Stack(make, count, key=stack_key, **options))
        self.stack = StackSequence(tuple(stacks))
        self.convolution = self.convolution_norm = None
        if config.convolution_size is not None:
            size = config.convolution_size
            self.convolution = Convolution(d_model, d_model, size=size, key=keys[4])
            self.convolution_norm = make_norm(numbers, d_model)

    @jax.named_scope("eqx_transformer.models.DeBERTa")
    @unbatched(tokens="seq")
    def __call__(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        valid: Bool[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """One vector for every position.

        Arguments:

        - `tokens`: their ids.
        - `token_types`: which type each is of; all of type 0 if not given.
        - `valid`: which tokens are not padding; those other than `pad_token_id` if not given.
        - `key`: for dropout; needed if there is any, unless switched off by
            `eqx.nn.inference_mode`.

        Raises:

        - `ValueError` if there are more than `max_len` tokens.
        """
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        start = self.embed(tokens, token_types=token_types, valid=valid, key=keys[0])
        valid = self.embedding.valid(tokens) if valid is None else valid
        mask = None if valid is None else Padding(valid)
        first, *rest = self.layers().stacks
        x = self.convolve(start, first(start, mask=mask, key=keys[1]))
        for stack in rest:
            x = stack(x, mask=mask, key=keys[2])
        return x

    def embed(
        self,
        tokens: Int[Array, " seq"],
        *,
        token_types: Int[Array, " seq"] | None = None,
        valid: Bool[Array, " seq"] | None = None,
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, "seq d_model"]:
        """The input of the first layer, zero at padding; the arguments are those of `__call__`."""
        x = self.embedding(tokens, token_types=token_types, key=key)
        valid = self.embedding.valid(tokens) if valid is None else valid
        # The convolution sees all its neighbours, padding too.
        return x if valid is None else jnp.where(valid[:, None], x, 0)

    def convolve(
        self, start: Float[Array, "seq d_model"], x: Float[Array, "seq d_model"]
    ) -> Float[Array, "seq d_model"]:
        """The first layer's output `x`, with the convolution of its input added if there is one."""
        if self.convolution is None:
            return x
        activation = ACTIVATIONS["gelu"]
        if self.config.convolution_activation == "tanh":
            activation = jnp.tanh
        return self.convolution_norm(x + activation(self.convolution(start)))

    def layers(self) -> StackSequence:
        """The layers, each with the vectors of distances."""
        relative = self.relative.weight
        if self.relative_norm is not None:
            relative = self.relative_norm(relative)
        layers = tuple(_with(relative, stack) for stack in self.stack.stacks)
        return eqx.tree_at(lambda stack: stack.stacks, self.stack, layers)


def _with(relative: Float[Array, "distances d_model"], stack: Any) -> Any:
    return eqx.tree_at(
        lambda stack: stack.blocks.attention.relative,
        stack,
        jnp.broadcast_to(relative, (stack.num_layers, *relative.shape)),
        is_leaf=lambda x: x is None,
    )


def _make_block(config: DeBERTaConfig, *, key: PRNGKeyArray) -> AbstractBlock:
    numbers = config.transformer
    attention_key, block_key = jax.random.split(key)
    attention = DisentangledAttention(
        numbers.d_model,
        numbers.num_heads,
        max_distance=config.distances,
        num_buckets=config.num_buckets,
        content_to_position=config.content_to_position,
        position_to_content=config.position_to_content,
        share_projections=config.share_projections,
        dropout_rate=numbers.dropout_rate,
        attention_fn=attention_fn_of(
            numbers.attention_implementation, numbers.attention_block_size
        ),
        key=attention_key,
    )
    return encoder_block(
        numbers.d_model,
        numbers.num_heads,
        numbers.d_ff,
        attention=attention,
        layout="post",
        make_norm=functools.partial(make_norm, numbers),
        activation=ACTIVATIONS[numbers.activation],
        gated=numbers.activation in GATED,
        dropout_rate=numbers.dropout_rate,
        key=block_key,
    )
