import dataclasses
import math
from typing import Literal, NamedTuple

from ..attention import Implementation
from ..nn import DynamicScaling, LinearScaling, Llama3Scaling, LongRoPEScaling, YaRNScaling
from ._checks import (
    check_not_negative,
    check_positive,
    check_rates,
    check_sizes,
    check_token_ids,
)
from ._config import AbstractConfig
from ._vocabulary import GATED, Activation

LayerType = Literal["global", "sliding"]
"""What a layer attends to: all earlier positions, or the last `window` ones."""

RoPEScaling = LinearScaling | DynamicScaling | Llama3Scaling | YaRNScaling | LongRoPEScaling

DType = Literal["float32", "bfloat16", "float16", "float64"]


class LayerKind(NamedTuple):
    """The ways in which layers of a model may differ."""

    sliding: bool
    experts: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig(AbstractConfig):
    """The numbers of multi-head latent attention; see `LatentAttention`.

    Arguments:

    - `kv_rank`: size of the latent vectors of keys and values.
    - `nope_head_dim`, `rope_head_dim`: sizes of the two parts of a query, without and with rotary
        positions.
    - `v_head_dim`: size of a value.
    - `q_rank`: size of the latent vectors of queries; `None` for no such vectors.
    - `norm_eps`: added to the mean square of latent vectors.
    """

    kv_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    q_rank: int | None = None
    norm_eps: float = 1e-6

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(self, "kv_rank", "nope_head_dim", "rope_head_dim", "v_head_dim", "q_rank")
        check_positive(self, "norm_eps")
        if self.rope_head_dim % 2:
            raise ValueError(
                f"MLAConfig: rope_head_dim={self.rope_head_dim} must be even, because rotary "
                "positions rotate pairs of features."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(AbstractConfig):
    """The numbers of layers with experts in the place of an MLP; see `MixtureOfExperts`.

    Arguments:

    - `num_experts`: how many experts.
    - `experts_per_token`: how many of them a position goes through.
    - `d_expert`: size inside an expert; `None` for `d_ff`.
    - `scores`: how the router's logits become scores: `"softmax"` over all experts, or
        `"sigmoid"` of each.
    - `renormalize`: whether the weights of the chosen experts sum to `route_scale`. With
        `"softmax"` this is the same as a softmax over the chosen logits alone.
    - `route_scale`: factor on the weights.
    - `router_bias`: whether the router has a bias.
    - `selection_bias`: whether scores get a bias for the choice only.
    - `num_groups`, `top_groups`: experts are in `num_groups` groups, and a position chooses only
        from its best `top_groups` groups.
    - `group_score`: what makes a group the best, its best expert or the sum of its best two.
    - `num_shared_experts`: how many further experts every position goes through; they are one MLP
        of `num_shared_experts * d_expert`.
    - `shared_gate`: whether their output has a sigmoid gate, one number per position.
    - `first_dense`, `every`, `dense_layers`: which layers have experts: layer `i` does if
        `i >= first_dense`, `i + 1` is a multiple of `every`, and `i` is not in `dense_layers`.
    """

    num_experts: int
    experts_per_token: int = 2
    d_expert: int | None = None
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    route_scale: float = 1.0
    router_bias: bool = False
    selection_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    num_shared_experts: int = 0
    shared_gate: bool = False
    first_dense: int = 0
    every: int = 1
    dense_layers: tuple[int, ...] = ()

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("num_experts", "experts_per_token", "d_expert", "num_groups", "top_groups"),
            "every",
        )
        check_positive(self, "route_scale")
        check_not_negative(self, "num_shared_experts", "first_dense")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"MoEConfig: experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}."
            )
        if any(layer < 0 for layer in self.dense_layers):
            raise ValueError(
                f"MoEConfig: dense_layers={self.dense_layers} counts layers from 0; none may be "
                "negative."
            )
        if self.shared_gate and not self.num_shared_experts:
            raise ValueError("MoEConfig: shared_gate=True needs num_shared_experts of at least 1.")
        if self.group_score != "max" and self.num_groups == 1:
            raise ValueError(
                f"MoEConfig: group_score={self.group_score!r} has no effect with num_groups=1."
            )

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` has experts."""
        regular = layer >= self.first_dense and (layer + 1) % self.every == 0
        return regular and layer not in self.dense_layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(AbstractConfig):
    """The numbers that make a `Llama`: any decoder-only language model.

    The defaults are those of Llama itself. Published models are in `presets`.

    Sizes:

    - `vocab_size`: how many token ids there are.
    - `d_model`: size of the vectors between layers.
    - `num_layers`: how many blocks.
    - `num_heads`: how many query heads.
    - `num_kv_heads`: how many key and value heads; `None` for `num_heads`.
    - `head_dim`: size of a head; `None` for `d_model / num_heads`.
    - `d_ff`: size inside the MLPs; `None` for `ffn_dim_multiplier * 8 / 3 * d_model`, rounded up to
        a multiple of `ffn_multiple_of`.
    - `max_len`: the longest sequence.

    Embeddings and output:

    - `tie_embeddings`: whether the output head is the embedding.
    - `head_bias`: whether the output head has a bias.
    - `embedding_scale`: factor on the embeddings of tokens. Gemma's is `sqrt(d_model)`.
    - `embedding_norm`: whether a norm follows, as in BLOOM.
    - `embedding_dropout_rate`: the probability with which a feature of an embedding is dropped.
    - `logit_soft_cap`: the bound `c` in `c * tanh(logits / c)`; `None` for no bound.

    Positions:

    - `positions`: how the model knows where tokens are: rotated queries and keys, a bias on scores,
        vectors added to the embeddings, or not at all.
    - `rope_theta`: base of the wavelengths of `"rope"`.
    - `rope_scaling`: how they change for long sequences; see `RoPE`.
    - `rope_local_theta`: that of the sliding layers, which then have no scaling (Gemma 3); `None`
        if they are like the others.
    - `rotary_fraction`: the share of the features of a head, the first ones, that is rotated.
    - `rope_interleaved`: whether pairs are neighbours; otherwise they are half of those features
        apart.
    - `alibi_scale`: factor on the slopes of `"alibi"`. Falcon's is `1 / sqrt(head_dim)`.

    Attention:

    - `causal`: whether a position sees no later ones. If not, there is no cache.
    - `window`: how many positions a query of a sliding layer sees, its own included (and as many
        later ones if not causal); `None` if there are no such layers.
    - `layer_types`: which layers are `"global"`, which `"sliding"`: one of these for all, or a
        pattern that is repeated up to `num_layers`. `None` for all sliding if there is a `window`.
    - `document_start_id`: a token that begins a document; a position sees only its own document.
        `None` if all tokens of a sequence are one document. (For other boundaries, pass a mask in
        the call.)
    - `query_scale`: factor on the scores; `None` for `1 / sqrt(head_dim)`.
    - `attention_soft_cap`: the bound `c` in `c * tanh(score / c)`; `None` for no bound.
    - `qk_norm`: whether queries and keys are normalised.
    - `qk_norm_over`: whether each head is normalised on its own, or the whole projection.
    - `clip_qkv`: the bound to which queries, keys and values are clipped; `None` for no bound.
    - `sinks`: whether every head has a learned score that takes part in the softmax only.
    - `mla`: the numbers of multi-head latent attention, which replaces the usual attention.

    MLPs:

    - `activation`: their nonlinearity, and whether they have a gate.
    - `mlp_clip`: the bound to which the gate and the other factor are clipped; `None` for no bound.
    - `mlp_up_offset`: added to the factor that is not the gate.
    - `moe`: the numbers of layers with experts; `None` if there are none.

    Norms, biases and wiring:

    - `norm`: root-mean-square or layer normalisation, everywhere.
    - `norm_eps`: added to the mean square or variance.
    - `norm_offset`: added to the weights of `"rms"`. Gemma's is 1.
    - `norm_bias`: whether norms of kind `"layer"` have biases.
    - `pre_norm`: whether a norm precedes attention and MLP.
    - `post_attention_norm`, `post_mlp_norm`: whether one follows, before the result is added.
    - `parallel_residual`: whether attention and MLP have the same input and are added together,
        with one norm for both or one for each.
    - `use_bias`: whether the projections of attention and MLP have biases.
    - `qkv_bias`, `o_bias`, `mlp_bias`: the same for some of them; `None` for `use_bias`.

    Training and computation:

    - `dropout_rate`: the probability with which an attention weight, and an element of a residual
        branch, is dropped.
    - `param_dtype`: of the parameters; `None` for the default floating dtype.
    - `dtype`: what the model computes in, and caches; `None` for that of the parameters.
    - `logits_dtype`: what the logits are computed in; `None` for `dtype`.
    - `remat`: what reverse mode keeps of each block. `"none"`: all it needs. `"full"`: only the
        input. `"dots"`: the input, and the results of attention and of products with weights, which
        takes about half of the memory and, on a CPU, less time.
    - `unroll`: how many blocks make one iteration of the loop over depth; `num_layers` for no loop.
    - `attention_implementation`: see `dot_product_attention`; `None` chooses.
    """

    vocab_size: int
    d_model: int = 512
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    ffn_multiple_of: int = 64
    ffn_dim_multiplier: float = 1.0
    max_len: int = 2048

    tie_embeddings: bool = False
    head_bias: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    embedding_dropout_rate: float = 0.0
    logit_soft_cap: float | None = None

    positions: Literal["rope", "alibi", "learned", "none"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RoPEScaling | None = None
    rope_local_theta: float | None = None
    rotary_fraction: float = 1.0
    rope_interleaved: bool = False
    alibi_scale: float = 1.0

    causal: bool = True
    window: int | None = None
    layer_types: LayerType | tuple[LayerType, ...] | None = None
    document_start_id: int | None = None
    query_scale: float | None = None
    attention_soft_cap: float | None = None
    qk_norm: bool = False
    qk_norm_over: Literal["head", "projection"] = "head"
    clip_qkv: float | None = None
    sinks: bool = False
    mla: MLAConfig | None = None

    activation: Activation = "swiglu"
    mlp_clip: float | None = None
    mlp_up_offset: float = 0.0
    moe: MoEConfig | None = None

    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_bias: bool = False
    pre_norm: bool = True
    post_attention_norm: bool = False
    post_mlp_norm: bool = False
    parallel_residual: Literal["none", "one_norm", "two_norms"] = "none"
    use_bias: bool = False
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    mlp_bias: bool | None = None

    dropout_rate: float = 0.0
    param_dtype: DType | None = None
    dtype: DType | None = None
    logits_dtype: DType | None = None
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    attention_implementation: Implementation | None = None

    @property
    def attention_head_dim(self) -> int:
        """The size of a head, of keys with `mla`."""
        if self.mla is not None:
            return self.mla.nope_head_dim + self.mla.rope_head_dim
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """How many features of a head are rotated by `positions="rope"`."""
        if self.mla is not None:
            return self.mla.rope_head_dim
        return int(self.attention_head_dim * self.rotary_fraction)

    @property
    def mlp_dim(self) -> int:
        """The size inside the MLPs."""
        if self.d_ff is not None:
            return self.d_ff
        size = self.ffn_dim_multiplier * 8 * self.d_model / 3
        return self.ffn_multiple_of * math.ceil(size / self.ffn_multiple_of)

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        types = self.layer_types
        if types is None:
            types = "global" if self.window is None else "sliding"
        types = (types,) if isinstance(types, str) else types
        return tuple(
            LayerKind(
                sliding=types[i % len(types)] == "sliding",
                experts=self.moe is not None and self.moe.has_experts(i),
            )
            for i in range(self.num_layers)
        )

    def check(self) -> None:
        """Checks the values of the fields; see `AbstractConfig`."""
        check_sizes(
            self,
            *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
            *("d_ff", "ffn_multiple_of", "max_len", "window", "unroll"),
        )
        check_positive(
            self,
            *("rope_theta", "rope_local_theta", "norm_eps", "ffn_dim_multiplier"),
            *("embedding_scale", "alibi_scale", "query_scale", "attention_soft_cap"),
            *("clip_qkv", "mlp_clip", "logit_soft_cap"),
        )
        check_rates(self, "dropout_rate", "embedding_dropout_rate")
        check_token_ids(self, self.vocab_size, "document_start_id")
        if self.unroll > self.num_layers:
            raise ValueError(
                f"LlamaConfig: unroll={self.unroll} is more than num_layers={self.num_layers}."
            )
        self._check_heads()
        self._check_layers()
        self._check_unused()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.mla is None and self.d_model % self.num_heads:
            raise ValueError(
                f"LlamaConfig: d_model={self.d_model} is not a multiple of "
                f"num_heads={self.num_heads}; change one, or give head_dim."
            )
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"LlamaConfig: num_heads={self.num_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; every key head must serve the same number of "
                "query heads."
            )
        if not 0 < self.rotary_fraction <= 1:
            raise ValueError(
                f"LlamaConfig: rotary_fraction={self.rotary_fraction} must be more than 0 and at "
                "most 1."
            )
        if self.positions != "rope" or (self.rotary_dim >= 2 and self.rotary_dim % 2 == 0):
            return
        if self.rotary_fraction < 1:
            raise ValueError(
                f"LlamaConfig: rotary_fraction={self.rotary_fraction} of head_dim="
                f"{self.attention_head_dim} rotates {self.rotary_dim} features, which must be even "
                "and at least 2."
            )
        origin = f" = d_model / num_heads = {self.d_model} / {self.num_heads}"
        raise ValueError(
            f"LlamaConfig: head_dim={self.attention_head_dim}"
            f"{origin if self.head_dim is None else ''} must be even, because rotary positions "
            "rotate pairs of features; give an even head_dim."
        )

    def _check_layers(self) -> None:
        if (
            isinstance(self.layer_types, tuple)
            and not 1 <= len(self.layer_types) <= self.num_layers
        ):
            raise ValueError(
                f"LlamaConfig: layer_types names {len(self.layer_types)} layers but must name from "
                f"1 to num_layers={self.num_layers}."
            )
        kinds = self.layer_kinds
        sliding = any(kind.sliding for kind in kinds)
        if sliding and self.window is None:
            raise ValueError("LlamaConfig: layer_types has sliding layers; give their window.")
        if self.window is not None and not sliding:
            raise ValueError(
                f"LlamaConfig: window={self.window} has no effect, because layer_types has no "
                "sliding layers."
            )
        if self.rope_local_theta is not None and not sliding:
            raise ValueError(
                f"LlamaConfig: rope_local_theta={self.rope_local_theta} has no effect, because "
                "there are no sliding layers."
            )
        if self.moe is not None and not any(kind.experts for kind in kinds):
            raise ValueError(
                f"LlamaConfig: moe leaves none of the num_layers={self.num_layers} layers with "
                "experts."
            )

    def _check_unused(self) -> None:
        """Raises an error for a field that is set but has no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        plain = self.activation not in GATED
        unused = {
            "d_ff is given": (self.d_ff is not None, "ffn_multiple_of", "ffn_dim_multiplier"),
            "tie_embeddings=True": (self.tie_embeddings, "head_bias"),
            "positions is not 'rope'": (
                self.positions != "rope",
                *("rope_scaling", "rope_local_theta", "rotary_fraction", "rope_interleaved"),
            ),
            "positions is not 'alibi'": (self.positions != "alibi", "alibi_scale"),
            "qk_norm=False": (not self.qk_norm, "qk_norm_over"),
            "mla is given": (
                self.mla is not None,
                *("num_kv_heads", "head_dim", "rotary_fraction", "qk_norm", "clip_qkv", "sinks"),
            ),
            f"activation={self.activation!r} has no gate": (plain, "mlp_clip", "mlp_up_offset"),
            "norm is not 'rms'": (self.norm != "rms", "norm_offset"),
            "norm is not 'layer'": (self.norm != "layer", "norm_bias"),
            "attention and MLP are parallel": (
                self.parallel_residual != "none",
                *("pre_norm", "post_attention_norm", "post_mlp_norm"),
            ),
        }
        for why, (applies, *names) in unused.items():
            for name in names:
                if applies and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"LlamaConfig: {name}={getattr(self, name)!r} has no effect, because "
                        f"{why}; leave it out."
                    )
        if self.mla is not None and self.positions != "rope":
            raise ValueError(
                f"LlamaConfig: positions={self.positions!r} must be 'rope' with mla, whose keys "
                "have a rotary part."
            )
