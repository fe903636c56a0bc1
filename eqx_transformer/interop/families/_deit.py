"""DeiT: ViT with a second token, whose head was distilled from another model."""

from typing import Any

from ...models import VisionTransformer, ViTConfig
from .._family import Family
from .._fields import Fields
from ._vit import (
    IGNORED,
    adapt_pooler,
    differences,
    read_num_classes,
    read_vit,
    vit_names,
    with_prefix,
    write_vit,
)


def _read(fields: Fields, **others: Any) -> ViTConfig:
    return read_vit(fields, distillation_token=True, **others)


_CLASSIFIER = Family(
    model_type="deit",
    architecture="DeiTForImageClassificationWithTeacher",
    model=VisionTransformer,
    read=lambda fields: _read(fields, num_classes=read_num_classes(fields)),
    write=write_vit,
    differences=differences,
    names=lambda config: {
        **with_prefix("deit.", vit_names(config)),
        "cls_classifier": "head",
        "distillation_classifier": "distillation_head",
    },
)
DEIT = Family(
    model_type="deit",
    architecture="DeiTModel",
    model=VisionTransformer,
    read=lambda fields: _read(fields, pooler=True),
    write=write_vit,
    differences=differences,
    names=vit_names,
    renamed=((r"^deit\.", ""),),
    ignored=IGNORED,
    adapt=adapt_pooler,
    heads=(_CLASSIFIER,),
)
