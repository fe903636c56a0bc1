import copy
import dataclasses
import inspect
import json
import pickle
from typing import get_args

import pytest

from eqx_transformer.attention import Implementation
from eqx_transformer.models import AbstractConfig, LlamaConfig


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
        ({"rope_theta": float("inf")}, "rope_theta=inf"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
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
