"""Rules against models of every kind, and what is refused."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from eqx_transformer.models import (
    EncoderDecoder,
    Llama,
    LlamaConfig,
    MLAConfig,
    MoEConfig,
    TransformerConfig,
    TransformerEncoder,
    Transolver,
    TransolverConfig,
    VisionTransformer,
    ViTConfig,
    presets,
)
from eqx_transformer.nn import Int8Linear, Linear
from eqx_transformer.sharding import (
    ParallelConfig,
    Rule,
    Rules,
    batch_sharding,
    shard,
    sharding_table,
    specs,
)
from eqx_transformer.training import add_lora

COLUMNS = {f"{name}_proj" for name in "q k v gate up q_up kv_up h f".split()}
LLAMA = LlamaConfig(vocab_size=32, d_model=16, num_layers=4, num_heads=4, d_ff=32)
TRANSFORMER = TransformerConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, d_ff=32)
KINDS = {
    "llama": (Llama, LLAMA.replace(tie_embeddings=False, use_bias=True, qk_norm=True)),
    "experts": (
        Llama,
        LLAMA.replace(moe=MoEConfig(num_experts=4, num_shared_experts=1, every=2)),
    ),
    "latent": (
        Llama,
        LLAMA.replace(
            mla=MLAConfig(kv_rank=8, q_rank=8, nope_head_dim=8, rope_head_dim=4, v_head_dim=8)
        ),
    ),
    "encoder": (TransformerEncoder, TRANSFORMER),
    "encoder-decoder": (EncoderDecoder, TRANSFORMER),
    "vit": (
        VisionTransformer,
        ViTConfig(
            image_size=8,
            patch_size=4,
            d_model=16,
            num_layers=2,
            num_heads=4,
            d_ff=32,
            num_classes=3,
        ),
    ),
    "transolver": (
        Transolver,
        TransolverConfig(
            num_features=2, out_features=1, d_model=16, num_layers=2, num_heads=4, num_conditions=2
        ),
    ),
}


def shapes(make, config):
    return eqx.filter_eval_shape(lambda key: make(config, key=key), jax.random.key(0))


def by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def mesh_of(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize("kind", KINDS)
def test_one_table_serves_every_model(kind):
    model = shapes(*KINDS[kind])
    split = by_path(specs(model, mesh_of(tensor=4)))
    arrays = {path: x for path, x in by_path(model).items() if hasattr(x, "shape")}
    assert split.keys() == arrays.keys()
    for path, x in arrays.items():
        spec = tuple(split[path]) + (None,) * (x.ndim - len(split[path]))
        module, field = ["", *path.split(".")][-2:]
        if module in COLUMNS:
            assert spec[-1] == "tensor", path
            assert set(spec[:-1]) <= {None}
        elif module in ("o_proj", "down_proj") and field == "weight":
            assert spec[-2] == "tensor", path
        elif module == "embedding" or (module == "head" and x.shape[-1] == 32):
            assert "tensor" in spec, path
        else:
            assert set(spec) <= {None}, path


@pytest.mark.parametrize("kind", KINDS)
def test_fsdp_splits_what_is_large(kind):
    """In one layer and one expert, and never the axes that count them."""
    model, mesh = shapes(*KINDS[kind]), mesh_of(fsdp=2)
    split = by_path(specs(model, mesh, Rules(fsdp_min_size=256)))
    for path, x in by_path(model).items():
        if not hasattr(x, "shape"):
            continue
        inner = x.shape[:]
        for name in ("blocks", "embeddings", "experts"):
            if f"{name}." in path.replace("shared_experts", ""):
                inner = inner[1:]
        if ".blocks.blocks." in path:  # layers of several kinds: a stack of pairs
            inner = x.shape[1:] if "mlp.experts." not in path else x.shape[2:]
        if np.prod(inner) >= 256 and any(n % 2 == 0 for n in inner):
            assert list(split[path]).count("fsdp") == 1, path
            assert list(split[path]).index("fsdp") >= x.ndim - len(inner), path
        else:
            assert split[path] == P(), path
    assert not any(by_path(specs(model, mesh)).values())  # all are small


def test_all_axes_at_once():
    model = shapes(*KINDS["experts"])
    mesh = mesh_of(data=2, fsdp=2, expert=2, tensor=2)
    split = by_path(specs(model, mesh, Rules(fsdp_min_size=0)))
    path = "stack.blocks.blocks.1.mlp."
    assert split[path + "experts.up_proj.weight"] == P(None, "expert", "fsdp", "tensor")
    assert split[path + "experts.down_proj.weight"] == P(None, "expert", "tensor", "fsdp")
    assert split[path + "shared_experts.up_proj.weight"] == P(None, "fsdp", "tensor")
    assert split[path + "router.weight"] == P(None, "fsdp")
    assert split["embedding.weight"] == P("tensor", "fsdp")


def test_layers_are_split_where_they_divide():
    model = shapes(*KINDS["llama"])
    split = by_path(specs(model, mesh_of(pipe=2, tensor=2)))
    assert split["stack.blocks.attention.q_proj.weight"] == P("pipe", None, "tensor")
    assert split["stack.blocks.mlp_residual.norm.weight"] == P("pipe")
    assert split["norm.weight"] == P()
    assert split["head.weight"] == P(None, "tensor")
    assert not any(by_path(specs(model, mesh_of(pipe=3))).values())  # of 4 layers


def test_adapters_and_quantised_weights_are_split_alike():
    key = jax.random.key(0)
    adapted = add_lora(Llama(LLAMA, key=key), rank=2, alpha=2.0, dora=True, key=key)
    split = by_path(specs(adapted, mesh_of(tensor=4)))
    q, o = "stack.blocks.attention.q_proj.", "stack.blocks.attention.o_proj."
    assert split[q + "base.weight"] == split[q + "b"] == P(None, None, "tensor")
    assert split[q + "magnitude"] == P(None, "tensor")
    assert split[q + "a"] == split[o + "b"] == P()
    assert split[o + "base.weight"] == split[o + "a"] == P(None, "tensor")

    linear = Int8Linear.from_linear(Linear(8, 8, use_bias=True, key=key))
    split = by_path(specs({"q_proj": linear}, mesh_of(tensor=4)))
    assert list(split.values()) == [P(None, "tensor"), P("tensor"), P("tensor")]


def test_states_of_optimisers_are_split_like_parameters():
    params = eqx.filter(Llama(*KINDS["llama"][1:], key=jax.random.key(0)), eqx.is_inexact_array)
    mesh, rules = mesh_of(fsdp=2, tensor=2), Rules(fsdp_min_size=0)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    adam = specs(optimiser.init(params), mesh, rules)[1][0]
    assert adam.count == P()
    assert by_path(adam.mu) == by_path(adam.nu) == by_path(specs(params, mesh, rules))


def test_the_first_rule_counts():
    model, mesh = shapes(*KINDS["llama"]), mesh_of(tensor=4)
    rules = Rules().first(Rule("q_proj", P()), Rule("norm.weight$", P(("tensor",))))
    split = by_path(specs(model, mesh, rules))
    assert split["stack.blocks.attention.q_proj.weight"] == P()
    assert split["stack.blocks.attention.k_proj.weight"] == P(None, None, "tensor")
    assert split["norm.weight"] == P("tensor")


def test_rules_that_decide_nothing_are_in_the_table():
    """They are no error: states of optimisers are split by the rules of their model."""
    model, mesh = shapes(*KINDS["llama"]), mesh_of(tensor=4)
    rules = Rules().first(Rule("q_proj", P()), Rule("qproj", P()), Rule("q_proj.weight$", P()))
    notes = [f"the rule {pattern!r} decides nothing" for pattern in ("qproj", "q_proj.weight$")]
    assert sharding_table(model, mesh, rules).splitlines()[-2:] == notes
    assert "decides nothing" not in sharding_table(model, mesh)


def test_two_mesh_axes_for_one():
    model, mesh = shapes(*KINDS["llama"]), mesh_of(tensor=2, more=2, one=1)
    rules = Rules().first(Rule("up_proj.weight", P(None, ("tensor", "more", "one"))))
    split = by_path(specs(model, mesh, rules))
    assert split["stack.blocks.mlp.up_proj.weight"] == P(None, None, ("tensor", "more"))


def test_axes_of_a_batch():
    assert batch_sharding(jax.make_mesh((2, 2), ("data", "tensor"))).spec == P(("data",))
    assert batch_sharding(jax.make_mesh((2, 4), ("fsdp", "expert"))).spec == P(("fsdp", "expert"))
    assert batch_sharding(jax.make_mesh((8,), ("tensor",))).spec == P()
    mesh = jax.make_mesh((2, 2, 2), ("data", "context", "pipe"))
    assert batch_sharding(mesh).spec == P(("pipe", "data"))
    assert batch_sharding(mesh, sequence=True).spec == P(("pipe", "data"), ("context",))
    mesh = jax.make_mesh((2,), ("context",))
    assert batch_sharding(mesh, sequence=True).spec == P(None, ("context",))


def test_meshes_are_taken_as_auto():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    x = shard({"x": jnp.ones(3)}, mesh)["x"]
    assert isinstance(x.sharding, NamedSharding)
    assert x.sharding.mesh.axis_types == (AxisType.Auto,)


def test_what_is_refused():
    model = shapes(*KINDS["llama"])
    with pytest.raises(ValueError, match=r"q_proj.weight has 16 elements along axis 1 .* 3 dev"):
        specs(model, mesh_of(tensor=3))
    with pytest.raises(ValueError, match=r"\('model',\).*'tensor'"):
        specs(model, mesh_of(model=2))
    with pytest.raises(ValueError, match=r"for 2 axes, but norm\.weight has 1"):
        specs(model, mesh_of(tensor=2), Rules().first(Rule("^norm", P(None, "tensor"))))
    with pytest.raises(ValueError, match=r"has 4 experts, which the 3 devices"):
        specs(shapes(*KINDS["experts"]), mesh_of(expert=3))
    with pytest.raises(ValueError, match="fsdp_min_size=-1"):
        Rules(fsdp_min_size=-1)
    with pytest.raises(ValueError, match="not a regular expression"):
        Rules((Rule("(", P()),))


def test_the_table_of_a_large_model():
    """On paper: no device has to be there, and nothing is computed."""
    config = presets.LLAMA_3_70B
    model = eqx.filter_eval_shape(lambda key: Llama(config, key=key), jax.random.key(0))
    table = sharding_table(model, mesh_of(fsdp=64, tensor=8)).splitlines()
    cells = [line.split() for line in table]
    (q_proj,) = (line for line in table if "q_proj" in line)
    assert "[80, 8192, 8192]" in q_proj and "[-, fsdp, tensor]" in q_proj
    assert q_proj.endswith(f" {80 * 8192 * 8192 * 4 // 512:,}")
    (norm,) = (line for line in table if line.startswith("norm.weight"))
    assert norm.split()[-2:] == ["-", f"{8192 * 4:,}"]
    whole = int(cells[-1][1].replace(",", ""))
    held = int(cells[-1][-1].replace(",", ""))
    assert whole == sum(x.size * 4 for x in jax.tree.leaves(eqx.filter(model, _is_shape)))
    assert whole / 512 < held < 1.02 * whole / 512
    assert cells[-1][3:5] == ["fsdp=64,", "tensor=8"]


def _is_shape(x):
    return isinstance(x, jax.ShapeDtypeStruct)


def test_parallel_config():
    config = ParallelConfig(fsdp=2, tensor=2, fsdp_min_size=7)
    mesh = config.mesh()
    others = {"pipe": 1, "expert": 1, "context": 1}
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2} | others
    assert config.rules() == Rules(fsdp_min_size=7)
    assert ParallelConfig.from_json(config.to_json()) == config
    for name in others:
        assert config.replace(**{name: 2}).mesh().shape[name] == 2
    assert dict(ParallelConfig(data=1, tensor=-1).mesh(jax.devices()[:4]).shape)["tensor"] == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fsdp": 0}, "fsdp=0 must be at least 1"),
        ({"fsdp": -1}, "data and fsdp are all -1"),
        ({"fsdp_min_size": -1}, "fsdp_min_size=-1"),
        ({"model": 2}, "model"),
    ],
)
def test_parallel_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**fields)


@pytest.mark.parametrize("fields", [{"fsdp": 3}, {"data": 2, "tensor": 2}])
def test_parallel_config_counts_devices(fields):
    with pytest.raises(ValueError, match="but there are 8"):
        ParallelConfig(**fields).mesh()
