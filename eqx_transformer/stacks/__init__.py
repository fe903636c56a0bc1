"""Blocks, which are the residual wiring of layers, and stacks of them, with depth as an axis."""

from ._biased_stack import BiasedStack as BiasedStack
from ._block import AbstractBlock as AbstractBlock
from ._block import BlockSequence as BlockSequence
from ._block import ParallelBlock as ParallelBlock
from ._block import TransformerBlock as TransformerBlock
from ._builders import Layout as Layout
from ._builders import decoder_block as decoder_block
from ._builders import encoder_block as encoder_block
from ._condition import Condition as Condition
from ._decoder_block import DecoderBlock as DecoderBlock
from ._decoder_block import DecoderCache as DecoderCache
from ._decoder_block import Source as Source
from ._inspect import attention_maps as attention_maps
from ._inspect import hidden_states as hidden_states
from ._pattern import LayerAddress as LayerAddress
from ._pattern import StackSequence as StackSequence
from ._pattern import layer_address as layer_address
from ._pattern import repeating_runs as repeating_runs
from ._pattern import stack_of_kinds as stack_of_kinds
from ._perceiver_block import PerceiverBlock as PerceiverBlock
from ._perceiver_block import PerceiverCache as PerceiverCache
from ._residual import Norm as Norm
from ._residual import Residual as Residual
from ._stack import Stack as Stack
from ._stack import linear_drop_path as linear_drop_path
from ._stack import unstacked as unstacked
