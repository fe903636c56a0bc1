"""A token is written into the caches where they are; the compiled program says so."""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from eqx_transformer.generation import PagedCache, generate
from eqx_transformer.models import Llama, LlamaConfig, MLAConfig
from eqx_transformer.stacks import unstacked

CACHES = {
    "heads": ({"num_kv_heads": 2}, None),
    "one head": ({"num_kv_heads": 1}, None),
    "int8": ({"num_kv_heads": 2}, jnp.int8),
    "a ring": ({"num_kv_heads": 2, "window": 5}, None),
    "a ring of one head, int8": ({"num_kv_heads": 1, "window": 5}, jnp.int8),
    "latents": (
        {"mla": MLAConfig(kv_rank=6, nope_head_dim=4, rope_head_dim=4, v_head_dim=5)},
        None,
    ),
}
FAST = ("latents", "a ring of one head, int8")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(")


def computations(text):
    """The type and the operation of every instruction, for each computation of a program."""
    for block in re.split(r"\n\n|\n}\n", text):
        yield [m.groups() for m in map(INSTRUCTION.match, block.splitlines()) if m]


def types_of(cache):
    """The types of its arrays, as a program writes them."""
    names = {"float32": "f32", "int8": "s8"}
    arrays = [x for x in jax.tree.leaves(cache) if x.ndim >= 2 and x.size]
    return [f"{names[x.dtype.name]}[{','.join(map(str, x.shape))}]" for x in arrays]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other platforms, other programs")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in CACHES]
)
def test_one_write_a_token_and_no_copy(name):
    options, dtype = CACHES[name]
    options = {"vocab_size": 23, "d_model": 16, "num_heads": 4, "d_ff": 24, **options}
    if "mla" not in options:
        options["head_dim"] = 6
    config = LlamaConfig(num_layers=1, max_len=80, **options)
    model = unstacked(Llama(config, key=jax.random.key(0)))
    cache = model.init_cache(71, dtype)

    def program(prompt, cache):
        return generate(model, prompt, max_new_tokens=6, temperature=0, cache=cache)

    text = jax.jit(program).lower(jnp.arange(9), cache).compile().as_text()
    types = types_of(cache.layers)
    loops = 0
    for instructions in computations(text):
        counts = collections.Counter(instructions)
        read = [counts[kind, "get-tuple-element"] >= types.count(kind) for kind in types]
        if not all(read) or any(counts[kind, "parameter"] for kind in types):
            continue  # not the loop over tokens
        loops += 1
        made = [x for x in instructions if x[0] in types and x[1] != "get-tuple-element"]
        assert sorted(made) == sorted((kind, "fusion") for kind in types)
    assert loops == 1


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other platforms, other programs")
@pytest.mark.parametrize("dtype", [jnp.int8, pytest.param(None, marks=pytest.mark.slow)])
def test_all_sequences_write_into_one_pool_where_it_is(dtype):
    config = LlamaConfig(
        vocab_size=23, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, num_layers=1, max_len=80
    )
    model = unstacked(Llama(config, key=jax.random.key(0)))
    cache = PagedCache.init(model, num_sequences=3, num_pages=2000, page_size=7, dtype=dtype)

    def step(cache, tokens):
        logits, cache = cache.extend(model, tokens)
        return jnp.argmax(logits, axis=-1), cache

    compiled = jax.jit(step, donate_argnums=0).lower(cache, jnp.zeros((3, 1), jnp.int32)).compile()
    types = types_of(cache.pools)
    every = [x for instructions in computations(compiled.as_text()) for x in instructions]
    made = {x for x in every if x[0] in types}
    # What writes the rows, alone or as the body of a loop over them.
    writes = {"parameter", "get-tuple-element", "fusion", "scatter", "dynamic-update-slice"}
    assert {operation for _, operation in made} <= writes
    for kind in types:
        assert every.count((kind, "fusion")) == types.count(kind)
    memory: Any = compiled.memory_analysis()
    pools = sum(x.nbytes for x in jax.tree.leaves(cache.pools))
    assert memory.alias_size_in_bytes >= pools > 4 * memory.temp_size_in_bytes
