"""Sampling from a model, and search, with its cache."""

from ._beam_search import Hypotheses as Hypotheses
from ._beam_search import beam_search as beam_search
from ._generate import AbstractDecoder as AbstractDecoder
from ._generate import generate as generate
from ._sampling import filter_min_p as filter_min_p
from ._sampling import filter_top_k as filter_top_k
from ._sampling import filter_top_p as filter_top_p
from ._sampling import sample as sample
