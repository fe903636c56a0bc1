"""Models, each built from a configuration of plain numbers."""

from ._config import AbstractConfig as AbstractConfig
from ._llama import Llama as Llama
from ._llama import LlamaConfig as LlamaConfig
