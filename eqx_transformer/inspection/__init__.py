"""Intermediate values of a model, as outputs to look at and as places to intervene."""

from ._capture import capture as capture
from ._lens import logit_lens as logit_lens
from ._patch import ablated as ablated
from ._patch import patched as patched
from ._patch import replaced as replaced
from ._sites import Site as Site
