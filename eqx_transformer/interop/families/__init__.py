"""The kinds of published models: one file each, with its configuration and names both ways."""

from typing import Final

from .._family import Family
from ._bart import BART
from ._beit import BEIT
from ._bert import BERT
from ._bloom import BLOOM
from ._clip import CLIP, CLIP_VISION
from ._deberta import DEBERTA_V2
from ._deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from ._deit import DEIT
from ._dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from ._dinov3 import DINOV3
from ._distilbert import DISTILBERT
from ._electra import ELECTRA
from ._falcon import FALCON
from ._gemma import GEMMA
from ._gemma2 import GEMMA2
from ._gemma3 import GEMMA3
from ._gpt2 import GPT2
from ._gpt_neox import GPT_NEOX
from ._gpt_oss import GPT_OSS
from ._llama import LLAMA
from ._marian import MARIAN
from ._mistral import MISTRAL
from ._mixtral import MIXTRAL
from ._modernbert import MODERNBERT
from ._mpt import MPT
from ._olmo2 import OLMO2
from ._phi3 import PHI3
from ._qwen2 import QWEN2
from ._qwen3 import QWEN3
from ._qwen3_moe import QWEN3_MOE
from ._roberta import ROBERTA
from ._siglip import SIGLIP, SIGLIP_VISION
from ._t5 import T5
from ._vit import VIT
from ._whisper import WHISPER

# A model that several of them can describe is saved as the first of these.
_ALL: Final = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, OLMO2),
    *(GPT2, GPT_NEOX, FALCON, MPT, BLOOM),
    *(MIXTRAL, QWEN3_MOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3),
    *(BERT, ROBERTA, DISTILBERT, ELECTRA, MODERNBERT, DEBERTA_V2),
    *(T5, BART, MARIAN, WHISPER),
    *(VIT, DEIT, DINOV2, DINOV2_WITH_REGISTERS, DINOV3, BEIT),
    *(CLIP, CLIP_VISION, SIGLIP, SIGLIP_VISION),
)
FAMILIES: Final[dict[str, Family]] = {family.model_type: family for family in _ALL}
