"""Mistral: Llama with a window."""

from typing import Any

from ...models import LlamaConfig
from .._fields import Fields
from ._decoder import decoder_family, read_llama, write_llama


def _read(fields: Fields) -> LlamaConfig:
    return LlamaConfig(**read_llama(fields), window=fields.take("sliding_window", 4096))


def _write(config: LlamaConfig) -> dict[str, Any]:
    return write_llama(config) | {"sliding_window": config.window}


MISTRAL = decoder_family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    read=_read,
    write=_write,
)
