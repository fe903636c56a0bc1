import dataclasses
from typing import Literal, NamedTuple

from ..attention import Implementation
from ..stacks import Layout
from ._checks import (
    check_not_negative,
    check_positive,
    check_rates,
    check_sizes,
    check_token_ids,
)
from ._config import AbstractConfig
from ._llama_config import LayerType
from ._vocabulary import Activation

Positions = Literal[
    "sinusoidal", "sinusoidal_halves", "learned", "rope", "alibi", "relative", "none"
]
"""How a model knows where tokens are: vectors added to embeddings, rotated queries and keys, a bias
on scores, or not at all.

- `"sinusoidal"`, `"sinusoidal_halves"`: fixed vectors, with alternating sines and cosines, or all
    sines first.
- `"learned"`: learned vectors.
- `"rope"`: queries and keys are rotated.
- `"alibi"`: a fixed bias, linear in the distance.
- `"relative"`: a learned bias for buckets of distances, the same in all layers, as in T5.
"""


class BlockKind(NamedTuple):
    """The ways in which layers of a stack may differ."""

    sliding: bool
    norm_first: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(AbstractConfig):
    """The numbers that make a `TransformerEncoder`, `TransformerDecoder` or `EncoderDecoder`.

    The defaults give the transformer of Vaswani et al. (2017), with norms before each branch. BERT
    and its kin, T5, BART and Marian are the same with other settings.

    Sizes:

    - `vocab_size`: how many token ids there are.
    - `d_model`: size of the vectors between layers.
    - `d_embedding`: size of the vectors of tokens and positions, which are projected to `d_model`
        if this is another; `None` for `d_model`.
    - `num_layers`: how many blocks; of an encoder-decoder, in the encoder.
    - `num_heads`: how many query heads.
    - `num_kv_heads`: how many key and value heads; `None` for as many as query heads.
    - `head_dim`: size of a head; `None` for `d_model / num_heads`.
    - `d_ff`: size inside the MLPs.
    - `num_decoder_layers`, `num_decoder_heads`, `decoder_d_ff`: the same for the decoder of an
        encoder-decoder; `None` for the encoder's.
    - `max_len`: the longest sequence.
    - `cache_max_len`: how many positions a cache has by default; `None` for `max_len`.

    Embeddings and output:

    - `pad_token_id`: the token that is padding, which is not attended to; `None` if there is none,
        or if masks are used instead.
    - `num_token_types`: how many types of tokens an encoder tells apart, such as first and second
        sentence.
    - `scale_embeddings`: whether embeddings are multiplied by the square root of their size.
    - `embedding_norm`: whether there is a norm after the sum of embeddings and positions.
    - `tie_embeddings`: whether the output head is the embedding.
    - `head_bias`: whether logits have a bias.
    - `scale_output`: whether the input of the head is multiplied by `1 / sqrt(d_model)`.
    - `pooler`: whether an encoder has a map from the first position to one vector, as in BERT.

    Positions:

    - `positions`: how the model knows where tokens are.
    - `position_offset`: the row of position 0 in the table of `"learned"` positions.
    - `uncounted_token_id`: a token that an encoder does not count, and puts at the position before
        the first, like RoBERTa's padding; `None` if all are counted.
    - `rope_theta`: base of the wavelengths of `"rope"`.
    - `rope_local_theta`: the same in layers of type `"sliding"`; `None` for `rope_theta`.
    - `relative_buckets`, `relative_max_distance`: those of `"relative"`; see `RelativeBias`.

    Blocks:

    - `layout`: where the norms are.
    - `norm`: which kind they are.
    - `norm_eps`: added to the variance or mean square; ignored for `"dynamic_tanh"`.
    - `first_norm`: whether the first block begins with a norm, in layouts where the others do.
    - `final_norm`: whether there is a norm after the last block.
    - `activation`: the nonlinearity of the MLPs.
    - `use_bias`: whether projections, and norms of kind `"layer"`, have biases.
    - `k_bias`: whether the projections of keys have biases, which cancel in a softmax unless keys
        are rotated or normalised; `None` for `use_bias`.
    - `layer_scale`: initial factor of the learned scale of each branch; `None` for no scale.

    Attention:

    - `attention`: `"softmax"`, or `"linear"` for `linear_attention` within each sequence, whose
        weights are not dropped. Attention to a source is always a softmax.
    - `window`: how many positions self-attention sees: a position itself and `window - 1` before
        it, in an encoder as many after it too. `None` for all. Attention to a source has no window.
    - `layer_types`: which layers have the window: one word for all of them or a pattern that
        repeats; `None` for all.
    - `query_scale`: factor on scores; `None` for `1 / sqrt(head_dim)`.
    - `qk_norm`: whether queries and keys are normalised, each head by an `RMSNorm`.
    - `gate`: a sigmoid gate on the output of attention, or on the values; see `Attention`.

    Mixtures of experts:

    - `num_experts`: how many experts are in the mixture that replaces each MLP; `None` for MLPs.
    - `experts_per_token`: how many of them are computed for a token.
    - `expert_capacity_factor`: room for tokens in every expert, relative to an even distribution;
        `None` for no limit.

    Training, and how it is computed:

    - `dropout_rate`: the probability with which an element of an embedding or of a residual branch,
        or an attention weight, is dropped.
    - `drop_path_rate`: the probability with which the last block's branches are dropped; that of
        the others grows linearly from 0.
    - `linear_chunk_size`: how many positions `attention="linear"` computes densely at a time.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    - `attention_block_size`: tile size of attention; `None` chooses.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input, and the results of attention and of products with weights.
    - `unroll`: how many blocks make one iteration of the loop over depth.
    """

    vocab_size: int
    d_model: int = 512
    d_embedding: int | None = None
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int = 2048
    num_decoder_layers: int | None = None
    num_decoder_heads: int | None = None
    decoder_d_ff: int | None = None
    max_len: int = 512
    cache_max_len: int | None = None

    pad_token_id: int | None = 0
    num_token_types: int | None = None
    scale_embeddings: bool = False
    embedding_norm: bool = False
    tie_embeddings: bool = False
    head_bias: bool = False
    scale_output: bool = False
    pooler: bool = False

    positions: Positions = "sinusoidal"
    position_offset: int = 0
    uncounted_token_id: int | None = None
    rope_theta: float = 10_000.0
    rope_local_theta: float | None = None
    relative_buckets: int = 32
    relative_max_distance: int = 128

    layout: Layout = "pre"
    norm: Literal["layer", "rms", "dynamic_tanh"] = "layer"
    norm_eps: float = 1e-5
    first_norm: bool = True
    final_norm: bool = True
    activation: Activation = "gelu"
    use_bias: bool = True
    k_bias: bool | None = None
    layer_scale: float | None = None

    attention: Literal["softmax", "linear"] = "softmax"
    window: int | None = None
    layer_types: LayerType | tuple[LayerType, ...] | None = None
    query_scale: float | None = None
    qk_norm: bool = False
    gate: Literal["output", "value"] | None = None

    num_experts: int | None = None
    experts_per_token: int = 2
    expert_capacity_factor: float | None = None

    dropout_rate: float = 0.1
    drop_path_rate: float = 0.0
    linear_chunk_size: int = 64
    attention_implementation: Implementation | None = None
    attention_block_size: int | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("vocab_size", "d_model", "d_embedding", "num_layers", "num_decoder_layers"),
            *("num_heads", "num_decoder_heads", "num_kv_heads", "head_dim", "d_ff"),
            *("decoder_d_ff", "max_len", "cache_max_len", "window", "num_token_types"),
            *("num_experts", "experts_per_token", "attention_block_size", "unroll"),
            *("linear_chunk_size", "relative_buckets", "relative_max_distance"),
        )
        check_positive(
            self,
            *("rope_theta", "rope_local_theta", "norm_eps", "layer_scale", "query_scale"),
            "expert_capacity_factor",
        )
        check_rates(self, "dropout_rate", "drop_path_rate")
        check_token_ids(self, self.vocab_size, "pad_token_id", "uncounted_token_id")
        if self.cache_max_len is not None and self.cache_max_len > self.max_len:
            raise ValueError(
                f"TransformerConfig: cache_max_len={self.cache_max_len} is more than "
                f"max_len={self.max_len}."
            )
        self._check_heads()
        self._check_positions()
        self._check_layers()
        if self.attention == "linear":
            self._check_linear()
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"TransformerConfig: experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}."
            )

    def _check_heads(self) -> None:
        for name in ("num_heads", "num_decoder_heads"):
            heads = getattr(self, name)
            if heads is None:
                continue
            if self.head_dim is None and self.d_model % heads:
                raise ValueError(
                    f"TransformerConfig: d_model={self.d_model} is not a multiple of "
                    f"{name}={heads}; change one, or give head_dim."
                )
            if self.num_kv_heads is not None and heads % self.num_kv_heads:
                raise ValueError(
                    f"TransformerConfig: {name}={heads} is not a multiple of num_kv_heads="
                    f"{self.num_kv_heads}; every key head must serve the same number of query "
                    "heads."
                )

    def _check_positions(self) -> None:
        head_dim = self.d_model // self.num_heads if self.head_dim is None else self.head_dim
        if self.positions == "rope" and head_dim % 2:
            raise ValueError(
                f"TransformerConfig: positions='rope' rotates pairs of features, so head_dim="
                f"{head_dim} must be even."
            )
        if self.positions in ("sinusoidal", "sinusoidal_halves") and self.embedding_dim % 2:
            name = "d_model" if self.d_embedding is None else "d_embedding"
            raise ValueError(
                f"TransformerConfig: positions={self.positions!r} has pairs of features, so {name}="
                f"{self.embedding_dim} must be even."
            )
        check_not_negative(self, "position_offset")
        if self.position_offset and self.positions != "learned":
            raise ValueError(
                f"TransformerConfig: position_offset={self.position_offset} is a row of the table "
                f"of positions='learned', but positions={self.positions!r} has none; leave it out."
            )
        if self.uncounted_token_id is not None and not self.position_offset:
            raise ValueError(
                f"TransformerConfig: uncounted_token_id={self.uncounted_token_id} is at the "
                "position before the first, so position_offset=0 must be at least 1."
            )
        if self.rope_local_theta is not None and self.positions != "rope":
            raise ValueError(
                f"TransformerConfig: rope_local_theta={self.rope_local_theta} has no meaning for "
                f"positions={self.positions!r}; leave it out, or use 'rope'."
            )

    def _check_layers(self) -> None:
        types = self._layer_types()
        if not types:
            raise ValueError("TransformerConfig: layer_types=() must have at least one type.")
        if self.layer_types is not None and (self.window is None) == ("sliding" in types):
            raise ValueError(
                f"TransformerConfig: window={self.window} and layer_types={self.layer_types!r} do "
                "not fit: give a window if, and only if, some layers are 'sliding'."
            )
        if self.rope_local_theta is not None and "sliding" not in types:
            raise ValueError(
                f"TransformerConfig: rope_local_theta={self.rope_local_theta} is that of 'sliding' "
                "layers, but there are none; give window, or leave it out."
            )
        if not self.first_norm and self.layout not in ("pre", "sandwich"):
            raise ValueError(
                f"TransformerConfig: first_norm=False leaves out a norm that layout="
                f"{self.layout!r} does not have; use 'pre' or 'sandwich'."
            )
        alike = len(set(types)) == 1 and self.first_norm
        for name, given in (
            ("positions='relative'", self.positions == "relative"),
            (f"drop_path_rate={self.drop_path_rate}", self.drop_path_rate > 0),
        ):
            if given and not alike:
                raise ValueError(
                    f"TransformerConfig: {name} needs layers that are all alike, but those of "
                    f"layer_types={self.layer_types!r}, first_norm={self.first_norm} are not."
                )

    def _check_linear(self) -> None:
        for name in (
            *("window", "gate", "attention_implementation", "attention_block_size"),
            *("query_scale", "k_bias"),
        ):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"TransformerConfig: {name}={getattr(self, name)!r} has no meaning for "
                    "attention='linear'; leave it out, or use 'softmax'."
                )
        if self.positions in ("alibi", "relative"):
            raise ValueError(
                f"TransformerConfig: positions={self.positions!r} changes scores, which "
                "attention='linear' does not have; use 'rope' or vectors."
            )

    @property
    def embedding_dim(self) -> int:
        """Size of the vectors of tokens and positions."""
        return self.d_model if self.d_embedding is None else self.d_embedding

    def _layer_types(self) -> tuple[str, ...]:
        if isinstance(self.layer_types, tuple):
            return self.layer_types
        if self.layer_types is None:
            return ("global" if self.window is None else "sliding",)
        return (self.layer_types,)

    def block_kinds(self, num_layers: int) -> list[BlockKind]:
        """The kind of block of each of `num_layers` layers."""
        types = self._layer_types()
        return [
            BlockKind(types[i % len(types)] == "sliding", self.first_norm or i > 0)
            for i in range(num_layers)
        ]
