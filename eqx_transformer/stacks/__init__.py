"""Blocks, which are the residual wiring of layers, and stacks of them, with depth as an axis."""

from ._block import AbstractBlock as AbstractBlock
from ._block import BlockSequence as BlockSequence
from ._block import ParallelBlock as ParallelBlock
from ._block import TransformerBlock as TransformerBlock
from ._builders import Layout as Layout
from ._builders import decoder_block as decoder_block
from ._builders import encoder_block as encoder_block
from ._decoder_block import DecoderBlock as DecoderBlock
from ._decoder_block import DecoderCache as DecoderCache
from ._decoder_block import Source as Source
from ._residual import Residual as Residual
from ._stack import Stack as Stack
from ._stack import linear_drop_path as linear_drop_path
