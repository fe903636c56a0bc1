"""Blocks (layers with their residual connections) and stacks of them."""

from ._block import AbstractBlock as AbstractBlock
from ._block import TransformerBlock as TransformerBlock
from ._stack import Stack as Stack
