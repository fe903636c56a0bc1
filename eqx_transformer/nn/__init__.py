"""Layers: parameters and the forward pass of one example, `[seq, d_model]`.

A batch is `jax.vmap`'s business.
"""

from ._attention import AbstractAttention as AbstractAttention
from ._attention import Attention as Attention
from ._cache import KVCache as KVCache
from ._embedding import Embedding as Embedding
from ._linear import Linear as Linear
from ._mlp import MLP as MLP
from ._mlp import GatedMLP as GatedMLP
from ._norm import LayerNorm as LayerNorm
from ._norm import RMSNorm as RMSNorm
from ._rope import RoPE as RoPE
from ._rope import apply_rope as apply_rope
