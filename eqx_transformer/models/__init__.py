"""Models, each built from a configuration of plain numbers."""

from ._config import AbstractConfig as AbstractConfig
from ._decoder import TokenCache as TokenCache
from ._decoder import TransformerDecoder as TransformerDecoder
from ._encoder import SequenceClassifier as SequenceClassifier
from ._encoder import TokenClassifier as TokenClassifier
from ._encoder import TransformerEncoder as TransformerEncoder
from ._encoder import pool as pool
from ._encoder_decoder import EncoderDecoder as EncoderDecoder
from ._llama import Llama as Llama
from ._llama import LlamaConfig as LlamaConfig
from ._token_embedding import TokenEmbedding as TokenEmbedding
from ._transformer_config import TransformerConfig as TransformerConfig
