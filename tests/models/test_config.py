import copy
import dataclasses
import inspect
import json
import pickle
from typing import get_args

import pytest

from eqx_transformer.attention import Implementation
from eqx_transformer.models import AbstractConfig, LlamaConfig, MLAConfig, MoEConfig
from eqx_transformer.nn import LongRoPEScaling, YaRNScaling


def test_json_round_trip():
    config = LlamaConfig(
        vocab_size=11,
        d_model=32,
        num_kv_heads=2,
        rope_theta=5e5,
        qk_norm=True,
        logit_soft_cap=30,
        remat="dots",
        attention_implementation="chunked",
    )
    assert LlamaConfig.from_json(config.to_json()) == config
    assert LlamaConfig.from_dict(config.to_dict()) == config
    assert list(config.to_dict()) == [f.name for f in dataclasses.fields(LlamaConfig)]
    assert json.loads(config.to_json())["num_kv_heads"] == 2
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    assert hash(config) == hash(copy.copy(config))


NESTED = LlamaConfig(
    vocab_size=11,
    num_layers=7,
    rope_interleaved=True,
    rope_scaling=YaRNScaling(factor=4, original_max_len=64, truncate=False),
    layer_types=("sliding", "global"),
    window=3,
    mla=MLAConfig(kv_rank=8, nope_head_dim=4, rope_head_dim=2, v_head_dim=4),
    moe=MoEConfig(num_experts=4, dense_layers=(1, 3), route_scale=2),
)
LONG = LongRoPEScaling(short_factors=(1, 1.5), long_factors=(2, 3.5), factor=4, original_max_len=8)


@pytest.mark.parametrize(
    "config",
    [NESTED, LlamaConfig(vocab_size=11, d_model=32, rope_scaling=LONG)],
    ids=["nested", "tuples of floats"],
)
def test_nested_round_trip(config):
    for other in (LlamaConfig.from_json(config.to_json()), LlamaConfig.from_dict(config.to_dict())):
        assert other == config and hash(other) == hash(config)
        assert type(other.rope_scaling) is type(config.rope_scaling)
        assert other.to_json() == config.to_json()
    assert config.replace(max_len=4).rope_scaling == config.rope_scaling
    assert config.replace(rope_scaling=None) != config


def test_nested_errors():
    fields = NESTED.to_dict()
    assert fields["moe"]["kind"] == "MoEConfig" and fields["rope_scaling"]["kind"] == "YaRNScaling"
    # Where only one class fits, it need not be named; unions must say which.
    moe = {k: v for k, v in fields["moe"].items() if k != "kind"}
    assert LlamaConfig.from_dict({**fields, "moe": moe}) == NESTED
    for change, message in (
        ({"rope_scaling": {"factor": 2.0}}, r"kind=None must be one of \['LinearScaling'"),
        ({"rope_scaling": {"kind": "Scaling"}}, "kind='Scaling'"),
        ({"rope_scaling": {"kind": "LinearScaling", "facter": 2}}, "did you mean 'factor'"),
        ({"rope_scaling": {"kind": "LinearScaling"}}, "'factor' is missing"),
        ({"rope_scaling": 2.0}, "LinearScaling or DynamicScaling or .* or None"),
        ({"moe": {**moe, "num_expert": 3}}, "MoEConfig has no field 'num_expert'"),
        ({"moe": {**moe, "dense_layers": [1.5]}}, r"dense_layers=\(1.5,\) .* a tuple of int"),
        ({"layer_types": ["local"]}, "'global' or 'sliding' or a tuple of 'global' or 'sliding'"),
    ):
        with pytest.raises(ValueError, match=message):
            LlamaConfig.from_dict({**fields, **change})


MOE = {"num_experts": 4}
MLA = {"kv_rank": 8, "nope_head_dim": 4, "rope_head_dim": 2, "v_head_dim": 4}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoEConfig(num_experts=0), "num_experts=0 must be at least 1"),
        (lambda: MoEConfig(num_experts=1), "experts_per_token=2 is more than num_experts=1"),
        (lambda: MoEConfig(**MOE, first_dense=-1), "first_dense=-1 must not be negative"),
        (lambda: MoEConfig(**MOE, dense_layers=(0, -1)), r"\(0, -1\) counts layers from 0"),
        (lambda: MoEConfig(**MOE, shared_gate=True), "needs num_shared_experts"),
        (lambda: MoEConfig(**MOE, group_score="top2"), "no effect with num_groups=1"),
        (lambda: MLAConfig(**{**MLA, "rope_head_dim": 3}), "rope_head_dim=3 must be even"),
        (lambda: MLAConfig(**{**MLA, "v_head_dim": 0}), "v_head_dim=0"),
    ],
)
def test_bad_parts(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_types": "sliding"}, "give their window"),
        ({"layer_types": "global", "window": 3}, "window=3 has no effect"),
        ({"layer_types": ("global",) * 7}, "names 7 layers but must name from 1 to num_layers=6"),
        ({"layer_types": ()}, "names 0 layers"),
        ({"rope_local_theta": 10.0}, "rope_local_theta=10.0 has no effect"),
        ({"rotary_fraction": 1.5}, "rotary_fraction=1.5 must be more than 0 and at most 1"),
        ({"rotary_fraction": 0.05}, "rotates 3 features, which must be even"),
        ({"moe": MoEConfig(**MOE, first_dense=6)}, "none of the num_layers=6 layers"),
        ({"positions": "alibi", "rope_interleaved": True}, "positions is not 'rope'"),
        ({"alibi_scale": 0.5}, "alibi_scale=0.5 has no effect.*positions is not 'alibi'"),
        ({"d_ff": 8, "ffn_multiple_of": 8}, "ffn_multiple_of=8 has no effect.*d_ff is given"),
        ({"tie_embeddings": True, "head_bias": True}, "head_bias=True has no effect"),
        ({"qk_norm_over": "projection"}, "qk_norm=False"),
        ({"activation": "relu", "mlp_clip": 7.0}, "'relu' has no gate"),
        ({"norm": "layer", "norm_offset": 1.0}, "norm is not 'rms'"),
        ({"norm_bias": True}, "norm is not 'layer'"),
        ({"parallel_residual": "one_norm", "post_mlp_norm": True}, "are parallel"),
        ({"mla": MLAConfig(**MLA), "sinks": True}, "sinks=True has no effect.*mla is given"),
        ({"mla": MLAConfig(**MLA), "positions": "none"}, "must be 'rope' with mla"),
        ({"embedding_dropout_rate": 1.0}, "embedding_dropout_rate=1.0"),
        ({"query_scale": 0.0}, "query_scale=0.0 must be positive"),
        ({"document_start_id": -1}, "document_start_id=-1 must be a token id, from 0 .* = 2"),
        ({"document_start_id": 3}, "document_start_id=3"),
    ],
)
def test_fields_that_do_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(vocab_size=3, **fields)


def test_replace():
    config = LlamaConfig(vocab_size=11)
    assert config.replace(d_model=64).d_model == 64
    assert config.replace(d_model=64) != config == config.replace()
    for bad in ({"d_model": 0}, {"d_modle": 64}):
        with pytest.raises(ValueError, match="d_mod"):
            config.replace(**bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 3  # pyright: ignore


@pytest.mark.parametrize(
    "make",
    [lambda **f: LlamaConfig(**f), lambda **f: LlamaConfig.from_dict(f)],
    ids=["call", "dict"],
)
def test_unknown_names(make):
    with pytest.raises(
        ValueError, match=r"^LlamaConfig has no field 'd_modle'; did you mean 'd_model'\?$"
    ):
        make(vocab_size=3, d_modle=3)
    with pytest.raises(ValueError, match=r"no field 'zzz'; its fields are \['vocab_size'"):
        make(vocab_size=3, zzz=3)


def test_missing_and_positional():
    with pytest.raises(TypeError, match="vocab_size"):
        LlamaConfig()  # pyright: ignore
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        LlamaConfig.from_dict({})
    with pytest.raises(TypeError):
        LlamaConfig(3)  # pyright: ignore
    with pytest.raises(ValueError, match="JSON object"):
        LlamaConfig.from_json("[]")
    assert "vocab_size: int" in str(inspect.signature(LlamaConfig))


def test_integers_are_fine_floats():
    config = LlamaConfig(vocab_size=3, rope_theta=10_000, logit_soft_cap=30)
    assert isinstance(config.rope_theta, float) and isinstance(config.logit_soft_cap, float)
    assert config.to_json() == config.replace(rope_theta=1e4).to_json()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": True}, r"num_layers=True \(of type bool\) must be int"),
        ({"num_layers": 2.0}, r"num_layers=2.0 \(of type float\) must be int"),
        ({"d_ff": "3"}, r"d_ff='3' \(of type str\) must be int or None"),
        ({"qk_norm": 1}, r"qk_norm=1 \(of type int\) must be bool"),
        ({"rope_theta": True}, r"rope_theta=True \(of type bool\) must be float"),
        ({"remat": "some"}, r"remat='some' .* must be 'none' or 'full' or 'dots'"),
        ({"remat": None}, r"remat=None"),
        ({"attention_implementation": "fast"}, r"attention_implementation='fast'"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"d_model": -8}, "d_model=-8"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"max_len": 0}, "max_len=0"),
        ({"window": 0}, "window=0"),
        ({"unroll": 0}, "unroll=0"),
        ({"unroll": 7}, "unroll=7 is more than num_layers=6"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be finite"),
        ({"norm_offset": float("nan")}, "norm_offset=nan must be finite"),
        ({"logit_soft_cap": -1.0}, "logit_soft_cap=-1.0"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"d_model": 500}, "d_model=500 is not a multiple of num_heads=8"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"d_model": 24}, "head_dim=3 = d_model / num_heads = 24 / 8 must be even"),
        ({"num_kv_heads": 3}, "num_heads=8 is not a multiple of num_kv_heads=3"),
    ],
)
def test_bad_values(fields, message):
    with pytest.raises(ValueError, match=f"^LlamaConfig: .*{message}"):
        LlamaConfig(**{"vocab_size": 3, **fields})


def test_every_documented_value():
    for remat in ("none", "full", "dots"):
        LlamaConfig(vocab_size=3, remat=remat)
    for implementation in (None, *get_args(Implementation)):
        LlamaConfig(vocab_size=3, attention_implementation=implementation)


def test_abstract():
    with pytest.raises(TypeError):
        AbstractConfig()  # pyright: ignore
