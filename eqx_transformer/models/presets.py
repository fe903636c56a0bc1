"""Published models, as configurations of `Llama`.

Every one is a constant to build from, as it is or with changes:

    config = presets.QWEN_3_8B.replace(max_len=4096, dtype="bfloat16")

A family is a configuration that says how it differs from Llama; its members add their sizes, in the
order of `_sized`. Parameter counts are tested against those of the published weights.
"""

import math
from typing import Any, Final

from ..nn import LinearScaling, Llama3Scaling, YaRNScaling
from ._llama_config import LlamaConfig, MLAConfig, MoEConfig


def _sized(
    family: LlamaConfig,
    d_model: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int | None,
    d_ff: int | None,
    **others: Any,
) -> LlamaConfig:
    sizes = {"d_model": d_model, "num_layers": num_layers, "num_heads": num_heads}
    return family.replace(num_kv_heads=num_kv_heads, d_ff=d_ff, **sizes, **others)


# Llama 2 (Touvron et al., 2023) and 3 (Grattafiori et al., 2024).

_LLAMA_2 = LlamaConfig(vocab_size=32_000, max_len=4096)
LLAMA_2_7B: Final = _sized(_LLAMA_2, 4096, 32, 32, None, 11_008)
LLAMA_2_13B: Final = _sized(_LLAMA_2, 5120, 40, 40, None, 13_824)
LLAMA_2_70B: Final = _sized(_LLAMA_2, 8192, 80, 64, 8, 28_672)

_LLAMA_3 = LlamaConfig(vocab_size=128_256, rope_theta=5e5, max_len=8192)
LLAMA_3_8B: Final = _sized(_LLAMA_3, 4096, 32, 32, 8, 14_336)
LLAMA_3_70B: Final = _sized(_LLAMA_3, 8192, 80, 64, 8, 28_672)

_LLAMA_3_1 = _LLAMA_3.replace(max_len=131_072, rope_scaling=Llama3Scaling(factor=8.0))
LLAMA_3_1_8B: Final = _sized(_LLAMA_3_1, 4096, 32, 32, 8, 14_336)
LLAMA_3_1_70B: Final = _sized(_LLAMA_3_1, 8192, 80, 64, 8, 28_672)
LLAMA_3_1_405B: Final = _sized(_LLAMA_3_1, 16_384, 126, 128, 8, 53_248)

_LLAMA_3_2 = _LLAMA_3_1.replace(tie_embeddings=True, rope_scaling=Llama3Scaling(factor=32.0))
LLAMA_3_2_1B: Final = _sized(_LLAMA_3_2, 2048, 16, 32, 8, 8192)
LLAMA_3_2_3B: Final = _sized(_LLAMA_3_2, 3072, 28, 24, 8, 8192)

# Mistral (Jiang et al., 2023) and Mixtral (Jiang et al., 2024).

_MISTRAL = LlamaConfig(vocab_size=32_000, rope_theta=1e6, max_len=32_768)
MISTRAL_7B_V0_1: Final = _sized(_MISTRAL, 4096, 32, 32, 8, 14_336, rope_theta=10_000.0, window=4096)
MISTRAL_7B_V0_3: Final = _sized(_MISTRAL, 4096, 32, 32, 8, 14_336, vocab_size=32_768)
MISTRAL_NEMO_12B: Final = _sized(
    _MISTRAL, 5120, 40, 32, 8, 14_336, head_dim=128, vocab_size=131_072, max_len=131_072
)
_MIXTRAL = _MISTRAL.replace(moe=MoEConfig(num_experts=8, experts_per_token=2))
MIXTRAL_8X7B: Final = _sized(_MIXTRAL, 4096, 32, 32, 8, 14_336)
MIXTRAL_8X22B: Final = _sized(_MIXTRAL, 6144, 56, 48, 8, 16_384, max_len=65_536)

# Gemma 1 and 2 (Gemma Team, 2024), and the language models of 3 (Gemma Team, 2025).


def _gemma(family: LlamaConfig, d_model: int, *sizes: int, **others: Any) -> LlamaConfig:
    num_layers, num_heads, num_kv_heads, d_ff = sizes
    config = _sized(family, d_model, num_layers, num_heads, num_kv_heads, d_ff, **others)
    return config.replace(embedding_scale=math.sqrt(d_model))


_GEMMA = LlamaConfig(
    vocab_size=256_000,
    head_dim=256,
    activation="geglu_tanh",
    norm_eps=1e-6,
    norm_offset=1.0,
    tie_embeddings=True,
    max_len=8192,
)
GEMMA_2B: Final = _gemma(_GEMMA, 2048, 18, 8, 1, 16_384)
GEMMA_7B: Final = _gemma(_GEMMA, 3072, 28, 16, 16, 24_576)

_GEMMA_2 = _GEMMA.replace(
    post_attention_norm=True,
    post_mlp_norm=True,
    layer_types=("sliding", "global"),
    window=4096,
    attention_soft_cap=50.0,
    logit_soft_cap=30.0,
)
GEMMA_2_2B: Final = _gemma(_GEMMA_2, 2304, 26, 8, 4, 9216)
GEMMA_2_9B: Final = _gemma(_GEMMA_2, 3584, 42, 16, 8, 14_336)
GEMMA_2_27B: Final = _gemma(_GEMMA_2, 4608, 46, 32, 16, 36_864, head_dim=128, query_scale=144**-0.5)

_GEMMA_3 = _GEMMA.replace(
    vocab_size=262_208,
    post_attention_norm=True,
    post_mlp_norm=True,
    qk_norm=True,
    layer_types=(*["sliding"] * 5, "global"),
    window=1024,
    rope_theta=1e6,
    rope_local_theta=10_000.0,
    rope_scaling=LinearScaling(factor=8.0),
    max_len=131_072,
)
_GEMMA_3_SMALL = _GEMMA_3.replace(vocab_size=262_144, window=512, rope_scaling=None, max_len=32_768)
GEMMA_3_270M: Final = _gemma(_GEMMA_3_SMALL, 640, 18, 4, 1, 2048)
GEMMA_3_1B: Final = _gemma(_GEMMA_3_SMALL, 1152, 26, 4, 1, 6912)
GEMMA_3_4B: Final = _gemma(_GEMMA_3, 2560, 34, 8, 4, 10_240)
GEMMA_3_12B: Final = _gemma(_GEMMA_3, 3840, 48, 16, 8, 15_360)
GEMMA_3_27B: Final = _gemma(_GEMMA_3, 5376, 62, 32, 16, 21_504, head_dim=128, query_scale=168**-0.5)

# Qwen 2 and 2.5 (Yang et al., 2024), and 3 (Yang et al., 2025).

_QWEN_2 = LlamaConfig(
    vocab_size=152_064, qkv_bias=True, rope_theta=1e6, norm_eps=1e-6, max_len=131_072
)
_QWEN_2_SMALL = _QWEN_2.replace(vocab_size=151_936, tie_embeddings=True)
QWEN_2_0_5B: Final = _sized(_QWEN_2_SMALL, 896, 24, 14, 2, 4864)
QWEN_2_1_5B: Final = _sized(_QWEN_2_SMALL, 1536, 28, 12, 2, 8960)
QWEN_2_7B: Final = _sized(_QWEN_2, 3584, 28, 28, 4, 18_944)
QWEN_2_72B: Final = _sized(_QWEN_2, 8192, 80, 64, 8, 29_568)
QWEN_2_57B_A14B: Final = _sized(
    _QWEN_2,
    *(3584, 28, 28, 4, None),
    vocab_size=151_936,
    moe=MoEConfig(
        num_experts=64,
        experts_per_token=8,
        d_expert=2560,
        renormalize=False,
        num_shared_experts=8,
        shared_gate=True,
    ),
)
QWEN_2_5_0_5B: Final = QWEN_2_0_5B.replace(max_len=32_768)
QWEN_2_5_1_5B: Final = QWEN_2_1_5B
QWEN_2_5_3B: Final = _sized(_QWEN_2_SMALL, 2048, 36, 16, 2, 11_008, max_len=32_768)
QWEN_2_5_7B: Final = QWEN_2_7B
QWEN_2_5_14B: Final = _sized(_QWEN_2, 5120, 48, 40, 8, 13_824)
QWEN_2_5_32B: Final = _sized(_QWEN_2, 5120, 64, 40, 8, 27_648)
QWEN_2_5_72B: Final = QWEN_2_72B

_QWEN_3 = LlamaConfig(
    vocab_size=151_936,
    head_dim=128,
    qk_norm=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    max_len=40_960,
)
_QWEN_3_SMALL = _QWEN_3.replace(tie_embeddings=True)
QWEN_3_0_6B: Final = _sized(_QWEN_3_SMALL, 1024, 28, 16, 8, 3072)
QWEN_3_1_7B: Final = _sized(_QWEN_3_SMALL, 2048, 28, 16, 8, 6144)
QWEN_3_4B: Final = _sized(_QWEN_3_SMALL, 2560, 36, 32, 8, 9728)
QWEN_3_8B: Final = _sized(_QWEN_3, 4096, 36, 32, 8, 12_288)
QWEN_3_14B: Final = _sized(_QWEN_3, 5120, 40, 40, 8, 17_408)
QWEN_3_32B: Final = _sized(_QWEN_3, 5120, 64, 64, 8, 25_600)
QWEN_3_30B_A3B: Final = _sized(
    _QWEN_3,
    *(2048, 48, 32, 4, None),
    moe=MoEConfig(num_experts=128, experts_per_token=8, d_expert=768),
)
QWEN_3_235B_A22B: Final = _sized(
    _QWEN_3,
    *(4096, 94, 64, 4, None),
    moe=MoEConfig(num_experts=128, experts_per_token=8, d_expert=1536),
)

# Phi-3 and Phi-4 (Abdin et al., 2024). The variants of Phi-3 for 131,072 tokens are these with a
# `LongRoPEScaling`, whose factors are in the files of the weights.

_PHI_3 = LlamaConfig(vocab_size=32_064, window=2047, max_len=4096)
PHI_3_MINI_4K: Final = _sized(_PHI_3, 3072, 32, 32, 32, 8192)
PHI_3_MEDIUM_4K: Final = _sized(_PHI_3, 5120, 40, 40, 10, 17_920)
PHI_4: Final = PHI_3_MEDIUM_4K.replace(
    vocab_size=100_352, window=None, rope_theta=250_000.0, max_len=16_384
)

# OLMo 2 (OLMo Team, 2025).

_OLMO_2 = LlamaConfig(
    vocab_size=100_352,
    pre_norm=False,
    post_attention_norm=True,
    post_mlp_norm=True,
    qk_norm=True,
    qk_norm_over="projection",
    norm_eps=1e-6,
    rope_theta=5e5,
    max_len=4096,
)
OLMO_2_1B: Final = _sized(_OLMO_2, 2048, 16, 16, 16, 8192)
OLMO_2_7B: Final = _sized(_OLMO_2, 4096, 32, 32, 32, 11_008)
OLMO_2_13B: Final = _sized(_OLMO_2, 5120, 40, 40, 40, 13_824)
OLMO_2_32B: Final = _sized(_OLMO_2, 5120, 64, 40, 8, 27_648)

# GPT-2 (Radford et al., 2019), GPT-NeoX (Black et al., 2022) and Pythia (Biderman et al., 2023).

_GPT = LlamaConfig(vocab_size=50_257, norm="layer", norm_bias=True, use_bias=True, max_len=2048)

_GPT_2 = _GPT.replace(
    positions="learned", activation="gelu_tanh", tie_embeddings=True, max_len=1024
)
GPT_2: Final = _sized(_GPT_2, 768, 12, 12, None, 3072)
GPT_2_MEDIUM: Final = _sized(_GPT_2, 1024, 24, 16, None, 4096)
GPT_2_LARGE: Final = _sized(_GPT_2, 1280, 36, 20, None, 5120)
GPT_2_XL: Final = _sized(_GPT_2, 1600, 48, 25, None, 6400)

_NEOX = _GPT.replace(
    vocab_size=50_304, activation="gelu", rotary_fraction=0.25, parallel_residual="two_norms"
)
GPT_NEOX_20B: Final = _sized(
    _NEOX, 6144, 44, 64, None, 24_576, vocab_size=50_432, activation="gelu_tanh"
)
PYTHIA_70M: Final = _sized(_NEOX, 512, 6, 8, None, 2048)
PYTHIA_160M: Final = _sized(_NEOX, 768, 12, 12, None, 3072)
PYTHIA_410M: Final = _sized(_NEOX, 1024, 24, 16, None, 4096)
PYTHIA_1B: Final = _sized(_NEOX, 2048, 16, 8, None, 8192)
PYTHIA_1_4B: Final = _sized(_NEOX, 2048, 24, 16, None, 8192)
PYTHIA_2_8B: Final = _sized(_NEOX, 2560, 32, 32, None, 10_240)
PYTHIA_6_9B: Final = _sized(_NEOX, 4096, 32, 32, None, 16_384, vocab_size=50_432)
PYTHIA_12B: Final = _sized(_NEOX, 5120, 36, 40, None, 20_480, vocab_size=50_688)

# Falcon (Almazrouei et al., 2023), MPT (MosaicML, 2023) and BLOOM (BigScience, 2022).

_FALCON = LlamaConfig(
    vocab_size=65_024,
    norm="layer",
    norm_bias=True,
    activation="gelu",
    tie_embeddings=True,
)
FALCON_7B: Final = _sized(_FALCON, 4544, 32, 71, 1, 18_176, parallel_residual="one_norm")
FALCON_40B: Final = _sized(_FALCON, 8192, 60, 128, 8, 32_768, parallel_residual="two_norms")

_MPT = LlamaConfig(
    vocab_size=50_432, norm="layer", positions="alibi", activation="gelu", tie_embeddings=True
)
MPT_7B: Final = _sized(_MPT, 4096, 32, 32, None, 16_384)

_BLOOM = _GPT.replace(
    vocab_size=250_880,
    positions="alibi",
    activation="gelu_tanh",
    embedding_norm=True,
    tie_embeddings=True,
)
BLOOM_560M: Final = _sized(_BLOOM, 1024, 24, 16, None, 4096)
BLOOM_7B1: Final = _sized(_BLOOM, 4096, 30, 32, None, 16_384)
BLOOM_176B: Final = _sized(_BLOOM, 14_336, 70, 112, None, 57_344)

# GPT-OSS (OpenAI, 2025).

_GPT_OSS = LlamaConfig(
    vocab_size=201_088,
    head_dim=64,
    activation="quick_geglu",
    mlp_clip=7.0,
    mlp_up_offset=1.0,
    use_bias=True,
    sinks=True,
    layer_types=("sliding", "global"),
    window=128,
    rope_theta=150_000.0,
    rope_scaling=YaRNScaling(factor=32.0, original_max_len=4096, truncate=False),
    max_len=131_072,
)
GPT_OSS_20B: Final = _sized(
    _GPT_OSS,
    *(2880, 24, 64, 8, 2880),
    moe=MoEConfig(num_experts=32, experts_per_token=4, router_bias=True),
)
GPT_OSS_120B: Final = _sized(
    _GPT_OSS,
    *(2880, 36, 64, 8, 2880),
    moe=MoEConfig(num_experts=128, experts_per_token=4, router_bias=True),
)

# DeepSeek-V2 and DeepSeek-V3 (DeepSeek-AI, 2024), the latter without its layer that predicts the
# token after the next.

_DEEPSEEK = LlamaConfig(
    vocab_size=102_400,
    norm_eps=1e-6,
    rope_interleaved=True,
    rope_scaling=YaRNScaling(
        factor=40.0, original_max_len=4096, mscale=0.707, mscale_all_dim=0.707
    ),
    mla=MLAConfig(q_rank=1536, kv_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128),
    max_len=163_840,
)
DEEPSEEK_V2_LITE: Final = _sized(
    _DEEPSEEK,
    *(2048, 27, 16, None, 10_944),
    mla=MLAConfig(kv_rank=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128),
    moe=MoEConfig(
        num_experts=64,
        experts_per_token=6,
        d_expert=1408,
        renormalize=False,
        num_shared_experts=2,
        first_dense=1,
    ),
)
DEEPSEEK_V2: Final = _sized(
    _DEEPSEEK,
    *(5120, 60, 128, None, 12_288),
    moe=MoEConfig(
        num_experts=160,
        experts_per_token=6,
        d_expert=1536,
        renormalize=False,
        route_scale=16.0,
        num_groups=8,
        top_groups=3,
        num_shared_experts=2,
        first_dense=1,
    ),
)
DEEPSEEK_V3: Final = _sized(
    _DEEPSEEK,
    *(7168, 61, 128, None, 18_432),
    vocab_size=129_280,
    rope_scaling=YaRNScaling(factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0),
    moe=MoEConfig(
        num_experts=256,
        experts_per_token=8,
        d_expert=2048,
        scores="sigmoid",
        selection_bias=True,
        route_scale=2.5,
        num_groups=8,
        top_groups=4,
        group_score="top2",
        num_shared_experts=1,
        first_dense=3,
    ),
)
