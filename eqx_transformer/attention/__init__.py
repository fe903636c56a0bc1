"""The attention functions: arrays in, arrays out, no parameters.

`dot_product_attention` handles masks, score mods, grouped queries, sinks and dropout; all its
implementations give the same result and every derivative of it. What does not fit it has a
function of its own: `linear_attention`, and `paged_attention` and `ring_attention` for keys that
are in pages, or on other devices.
"""

from ._api import FEW_QUERIES as FEW_QUERIES
from ._api import Explanation as Explanation
from ._api import Implementation as Implementation
from ._api import attention_and_lse as attention_and_lse
from ._api import attention_weights as attention_weights
from ._api import dot_product_attention as dot_product_attention
from ._api import explain_attention as explain_attention
from ._grid import GridBias as GridBias
from ._grid import GridWindow as GridWindow
from ._linear import FeatureMap as FeatureMap
from ._linear import RandomFeatures as RandomFeatures
from ._linear import elu_plus_one as elu_plus_one
from ._linear import linear_attention as linear_attention
from ._masks import EMPTY as EMPTY
from ._masks import FULL as FULL
from ._masks import PARTIAL as PARTIAL
from ._masks import AbstractMask as AbstractMask
from ._masks import And as And
from ._masks import Causal as Causal
from ._masks import Dense as Dense
from ._masks import Not as Not
from ._masks import Or as Or
from ._masks import Padding as Padding
from ._masks import Predicate as Predicate
from ._masks import Prefix as Prefix
from ._masks import Segments as Segments
from ._masks import SlidingWindow as SlidingWindow
from ._masks import Strided as Strided
from ._masks import TokenGroups as TokenGroups
from ._masks import lookback as lookback
from ._paged import PagedKV as PagedKV
from ._paged import paged_attention as paged_attention
from ._ring import Layout as Layout
from ._ring import ring_attention as ring_attention
from ._ring import zigzag_order as zigzag_order
from ._score_mods import ALiBi as ALiBi
from ._score_mods import Compose as Compose
from ._score_mods import DenseBias as DenseBias
from ._score_mods import RelativeBias as RelativeBias
from ._score_mods import ScoreMod as ScoreMod
from ._score_mods import SoftCap as SoftCap
from ._score_mods import alibi_slopes as alibi_slopes
