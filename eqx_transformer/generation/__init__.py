"""Sampling from a model, and search, with its cache."""

from ._beam_search import Hypotheses as Hypotheses
from ._beam_search import beam_search as beam_search
from ._generate import Generation as Generation
from ._generate import generate as generate
from ._generate import generate_with_log_probs as generate_with_log_probs
from ._paged_cache import PagedCache as PagedCache
from ._processors import AllowTokens as AllowTokens
from ._processors import ForbidRepeats as ForbidRepeats
from ._processors import FrequencyPenalty as FrequencyPenalty
from ._processors import History as History
from ._processors import LogitBias as LogitBias
from ._processors import PresencePenalty as PresencePenalty
from ._processors import Processor as Processor
from ._processors import RepetitionPenalty as RepetitionPenalty
from ._prompt import AbstractDecoder as AbstractDecoder
from ._sampling import filter_logits as filter_logits
from ._sampling import filter_min_p as filter_min_p
from ._sampling import filter_top_k as filter_top_k
from ._sampling import filter_top_p as filter_top_p
from ._sampling import filter_typical_p as filter_typical_p
from ._sampling import sample as sample
from ._speculative import PromptLookup as PromptLookup
from ._speculative import Speculation as Speculation
from ._speculative import generate_speculatively as generate_speculatively
