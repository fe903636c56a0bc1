"""Published configurations: as many parameters as the published weights have."""

import math

import equinox as eqx
import jax
import jax.random as jr
import pytest

from eqx_transformer.models import Llama, LlamaConfig, presets

# Those of the weights as they are distributed: without the tower for images (Gemma 3), without the
# extra layer and what balances the experts (DeepSeek-V3).
PARAMETERS = {
    "LLAMA_2_7B": 6_738_415_616,
    "LLAMA_2_13B": 13_015_864_320,
    "LLAMA_2_70B": 68_976_648_192,
    "LLAMA_3_8B": 8_030_261_248,
    "LLAMA_3_70B": 70_553_706_496,
    "LLAMA_3_1_8B": 8_030_261_248,
    "LLAMA_3_1_70B": 70_553_706_496,
    "LLAMA_3_1_405B": 405_853_388_800,
    "LLAMA_3_2_1B": 1_235_814_400,
    "LLAMA_3_2_3B": 3_212_749_824,
    "MISTRAL_7B_V0_1": 7_241_732_096,
    "MISTRAL_7B_V0_3": 7_248_023_552,
    "MISTRAL_NEMO_12B": 12_247_782_400,
    "MIXTRAL_8X7B": 46_702_792_704,
    "MIXTRAL_8X22B": 140_620_634_112,
    "GEMMA_2B": 2_506_172_416,
    "GEMMA_7B": 8_537_680_896,
    "GEMMA_2_2B": 2_614_341_888,
    "GEMMA_2_9B": 9_241_705_984,
    "GEMMA_2_27B": 27_227_128_320,
    "GEMMA_3_270M": 268_098_176,
    "GEMMA_3_1B": 999_885_952,
    "GEMMA_3_4B": 3_880_263_168,
    "GEMMA_3_12B": 11_766_034_176,
    "GEMMA_3_27B": 27_009_346_304,
    "QWEN_2_0_5B": 494_032_768,
    "QWEN_2_1_5B": 1_543_714_304,
    "QWEN_2_7B": 7_615_616_512,
    "QWEN_2_72B": 72_706_203_648,
    "QWEN_2_57B_A14B": 57_408_658_944,
    "QWEN_2_5_0_5B": 494_032_768,
    "QWEN_2_5_1_5B": 1_543_714_304,
    "QWEN_2_5_3B": 3_085_938_688,
    "QWEN_2_5_7B": 7_615_616_512,
    "QWEN_2_5_14B": 14_770_033_664,
    "QWEN_2_5_32B": 32_763_876_352,
    "QWEN_2_5_72B": 72_706_203_648,
    "QWEN_3_0_6B": 596_049_920,
    "QWEN_3_1_7B": 1_720_574_976,
    "QWEN_3_4B": 4_022_468_096,
    "QWEN_3_8B": 8_190_735_360,
    "QWEN_3_14B": 14_768_307_200,
    "QWEN_3_32B": 32_762_123_264,
    "QWEN_3_30B_A3B": 30_532_122_624,
    "QWEN_3_235B_A22B": 235_093_634_560,
    "PHI_3_MINI_4K": 3_821_079_552,
    "PHI_3_MEDIUM_4K": 13_960_238_080,
    "PHI_4": 14_659_507_200,
    "OLMO_2_1B": 1_484_916_736,
    "OLMO_2_7B": 7_298_617_344,
    "OLMO_2_13B": 13_716_198_400,
    "OLMO_2_32B": 32_234_279_936,
    "GPT_2": 124_439_808,
    "GPT_2_MEDIUM": 354_823_168,
    "GPT_2_LARGE": 774_030_080,
    "GPT_2_XL": 1_557_611_200,
    "GPT_NEOX_20B": 20_554_567_680,
    "PYTHIA_70M": 70_426_624,
    "PYTHIA_160M": 162_322_944,
    "PYTHIA_410M": 405_334_016,
    "PYTHIA_1B": 1_011_781_632,
    "PYTHIA_1_4B": 1_414_647_808,
    "PYTHIA_2_8B": 2_775_208_960,
    "PYTHIA_6_9B": 6_857_302_016,
    "PYTHIA_12B": 11_846_072_320,
    "FALCON_7B": 6_921_720_704,
    "FALCON_40B": 41_303_293_952,
    "MPT_7B": 6_649_286_656,
    "BLOOM_560M": 559_214_592,
    "BLOOM_7B1": 7_069_016_064,
    "BLOOM_176B": 176_247_271_424,
    "GPT_OSS_20B": 20_914_757_184,
    "GPT_OSS_120B": 116_829_156_672,
    "DEEPSEEK_V2_LITE": 15_706_484_224,
    "DEEPSEEK_V2": 235_741_434_880,
    "DEEPSEEK_V3": 671_026_404_352,
}


def test_every_preset_is_here():
    names = {name for name, x in vars(presets).items() if isinstance(x, LlamaConfig)}
    assert {name for name in names if not name.startswith("_")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    config = getattr(presets, name)
    assert LlamaConfig.from_json(config.to_json()) == config
    model = eqx.filter_eval_shape(Llama, config, key=jr.key(0))
    leaves = [x for x in jax.tree.leaves(model) if isinstance(x, jax.ShapeDtypeStruct)]
    assert sum(math.prod(x.shape) for x in leaves if x.dtype == "float32") == PARAMETERS[name]
