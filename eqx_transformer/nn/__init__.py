"""Layers: parameters and the forward pass of one example, `[seq, d_model]`.

A batch is `jax.vmap`'s business.
"""

from ._attention import AbstractAttention as AbstractAttention
from ._attention import Attention as Attention
from ._cache import KVCache as KVCache
from ._cross_attention import CrossAttention as CrossAttention
from ._cross_attention import Memory as Memory
from ._drop_path import DropPath as DropPath
from ._embedding import Embedding as Embedding
from ._layer_scale import LayerScale as LayerScale
from ._linear import Linear as Linear
from ._linear_attention import LinearAttention as LinearAttention
from ._linear_attention import LinearAttentionCache as LinearAttentionCache
from ._mlp import MLP as MLP
from ._mlp import GatedMLP as GatedMLP
from ._moe import MixtureOfExperts as MixtureOfExperts
from ._moe import RouterStats as RouterStats
from ._norm import DynamicTanh as DynamicTanh
from ._norm import LayerNorm as LayerNorm
from ._norm import RMSNorm as RMSNorm
from ._positions import LearnedPositions as LearnedPositions
from ._positions import SinusoidalPositions as SinusoidalPositions
from ._rope import RoPE as RoPE
from ._rope import apply_rope as apply_rope
