"""Looking changes nothing, and what is put in place of a value is what the model goes on with."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.attention import Padding
from eqx_transformer.generation import generate
from eqx_transformer.inspection import ablated, capture, logit_lens, patched, replaced
from eqx_transformer.models import (
    DeBERTa,
    DeBERTaConfig,
    EncoderDecoder,
    Llama,
    LlamaConfig,
    MLAConfig,
    MoEConfig,
    TransformerConfig,
    TransformerDecoder,
    TransformerEncoder,
    VisionTransformer,
    ViTConfig,
)
from eqx_transformer.stacks import Stack, attention_maps, unstacked
from eqx_transformer.training import add_lora, merge_lora

SIZES = {"vocab_size": 20, "d_model": 16, "num_heads": 4, "max_len": 32}
TOKENS = jr.randint(jr.key(1), (9,), 1, 20)
OTHER = jr.randint(jr.key(2), (9,), 1, 20)
DEEP = {"d_ff": 24, "num_layers": 2, "dropout_rate": 0.0}
SITES = ("input", "output", "attention", "queries", "keys", "values", "weights", "heads", "mlp")


@eqx.filter_jit
def call(function, *arguments, **options):
    return function(*arguments, **options)


@functools.cache
def llama(**changes):
    config = LlamaConfig(num_layers=2, d_ff=24, num_kv_heads=2, **SIZES).replace(**changes)
    return Llama(config, key=jr.key(0))


@functools.cache
def transformer(cls, **changes):
    return cls(TransformerConfig(**SIZES, **DEEP).replace(**changes), key=jr.key(0))


@functools.cache
def vit(**changes):
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 1, "d_model": 16, "num_heads": 4}
    config = ViTConfig(**sizes, num_layers=2, d_ff=24, num_classes=3).replace(**changes)
    return VisionTransformer(config, key=jr.key(0))


@functools.cache
def deberta():
    of_layers = {"layout": "post", "final_norm": False, "embedding_norm": True, "use_bias": True}
    config = TransformerConfig(**SIZES, **DEEP, **of_layers, positions="none", pad_token_id=0)
    distances = {"max_distance": 8, "num_buckets": 4, "convolution_size": 3}
    return DeBERTa(DeBERTaConfig(transformer=config, **distances), key=jr.key(0))


MIXED = {
    "num_layers": 5,
    "layer_types": ("sliding", "global", "sliding", "global", "sliding"),
    "window": 3,
    "moe": MoEConfig(num_experts=4, first_dense=4),
}
IMAGE = jr.normal(jr.key(3), (1, 8, 8))
MODELS = {
    "llama": lambda: (llama(remat="full"), (TOKENS,), (*SITES, "neurons")),
    "mixed": lambda: (llama(**MIXED), (TOKENS,), (*SITES, "neurons", "router")),
    "parallel": lambda: (llama(parallel_residual="one_norm", sinks=True), (TOKENS,), SITES),
    "latent": lambda: (
        llama(
            num_kv_heads=None,
            mla=MLAConfig(kv_rank=8, nope_head_dim=4, rope_head_dim=4, v_head_dim=4),
        ),
        (TOKENS,),
        SITES,
    ),
    "taken apart": lambda: (unstacked(llama()), (TOKENS,), (*SITES, "neurons")),
    "decoder": lambda: (
        transformer(TransformerDecoder, num_experts=2),
        (TOKENS,),
        (*SITES, "router"),
    ),
    "shared bias": lambda: (
        transformer(TransformerEncoder, positions="relative"),
        (TOKENS.at[-2:].set(0),),
        (*SITES, "neurons"),
    ),
    "images": lambda: (
        vit(relative_bias=True, share_relative_bias=True, positions="none"),
        (jr.normal(jr.key(3), (1, 8, 12)),),
        SITES,
    ),
    "distances": lambda: (deberta(), (TOKENS,), SITES),
}


# The others differ in what the parts of a layer are, not in how they are found.
COMMON = ("mixed", "taken apart", "shared bias")


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


RARE = [slow(name) for name in MODELS if name not in COMMON]


@pytest.mark.parametrize("name", [*COMMON, *RARE])
def test_looking_changes_nothing_and_neither_does_putting_it_back(name):
    model, arguments, sites = MODELS[name]()

    @eqx.filter_jit
    def run(model):
        out, seen = capture(model, *sites)(*arguments)
        same = model
        for site in sites:
            values = seen[site]
            same = replaced(same, site, values, jnp.ones(len(values), bool))
        return model(*arguments), out, same(*arguments), seen

    expected, out, again, seen = run(model)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(again, expected, atol=2e-6)
    assert set(seen) == set(sites)
    if name != "distances":  # there is a convolution between
        np.testing.assert_array_equal(seen["input"][1:], seen["output"][:-1])
    layers = len(seen["output"])
    assert layers == (5 if name == "mixed" else 2)
    if "router" in sites:
        assert seen["router"].shape == ((1, 9, 4) if name == "mixed" else (2, 9, 2))
    if "neurons" in sites:
        assert len(seen["neurons"]) == (4 if name == "mixed" else layers)
    # What branches add is all that is between blocks, unless something is done to it on the way.
    if name not in ("images", "shared bias", "distances"):
        total = seen["input"] + seen["attention"] + seen["mlp"]
        np.testing.assert_allclose(total, seen["output"], atol=2e-6)


@pytest.mark.parametrize("name", ["mixed", *(slow(x) for x in ("taken apart", "shared bias"))])
def test_rows_belong_to_layers_in_order(name):
    model, arguments, _ = MODELS[name]()
    layers = 5 if name == "mixed" else 2

    def numbered(x, i):
        return jnp.full_like(x, i)

    numbers = jnp.arange(layers)
    for site in ("output", "attention", "queries"):
        changed = patched(model, site, numbered, numbers)
        _, seen = call(capture(changed, site), *arguments)
        np.testing.assert_array_equal(seen[site].reshape(layers, -1)[:, 0], numbers)


def test_a_layer_of_another_prompt_gives_the_logits_of_that_prompt():
    model = llama()
    expected, other = call(capture(model, "output"), OTHER)
    for layer in range(2):
        where = jnp.arange(2) == layer
        out = call(replaced(model, "output", other["output"], where), TOKENS)
        np.testing.assert_allclose(out, expected, atol=2e-6)
    # One position only: those before it do not see it, and from then on it is felt.
    where = jnp.zeros((2, 9), bool).at[0, 4].set(True)
    out = call(replaced(model, "output", other["output"], where), TOKENS)
    plain = call(model, TOKENS)
    np.testing.assert_allclose(out[:4], plain[:4], atol=2e-6)
    assert jnp.all(jnp.any(jnp.abs(out[4:] - plain[4:]) > 1e-4, axis=-1))


def test_one_head_of_another_prompt():
    model = llama()
    _, here = call(capture(model, "heads"), TOKENS)
    _, other = call(capture(model, "heads"), OTHER)
    where = jnp.zeros((2, 1, 4), bool).at[1, 0, 2].set(True)
    _, seen = call(capture(replaced(model, "heads", other["heads"], where), "heads"), TOKENS)
    expected = here["heads"].at[1, :, 2].set(other["heads"][1, :, 2])
    np.testing.assert_allclose(seen["heads"], expected, atol=2e-6)


def test_without_heads_attention_gives_nothing():
    model = llama()
    without = ablated(model, jnp.zeros((2, 4)))
    _, seen = call(capture(without, "attention", "mlp", "input", "output"), TOKENS)
    np.testing.assert_array_equal(seen["attention"], jnp.zeros_like(seen["attention"]))
    np.testing.assert_allclose(seen["input"] + seen["mlp"], seen["output"], atol=2e-6)
    whole = call(ablated(model, jnp.ones((2, 4))), TOKENS)
    np.testing.assert_allclose(whole, call(model, TOKENS), atol=2e-6)


def test_all_heads_in_turn_by_vmap():
    model = llama()
    keep = 1 - jnp.eye(8).reshape(8, 2, 4)
    out = eqx.filter_jit(jax.vmap(lambda keep: ablated(model, keep)(TOKENS)))(keep)
    weight = model.stack.blocks.attention.o_proj.weight
    for i in (1, 6):
        layer, head = divmod(i, 4)
        # The same by hand: what the head gives meets zeros.
        zeroed = weight.at[layer, 4 * head : 4 * head + 4].set(0)
        by_hand = eqx.tree_at(lambda m: m.stack.blocks.attention.o_proj.weight, model, zeroed)
        np.testing.assert_allclose(out[i], call(by_hand, TOKENS), atol=2e-6)


def test_a_batch_by_vmap():
    model, batch = llama(), jnp.stack([TOKENS, OTHER])
    out, seen = call(eqx.filter_vmap(capture(model, "weights")), batch)
    assert seen["weights"].shape == (2, 2, 4, 9, 9)
    one, of_one = call(capture(model, "weights"), OTHER)
    np.testing.assert_allclose(out[1], one, atol=2e-6)
    np.testing.assert_allclose(seen["weights"][1], of_one["weights"], atol=1e-6)


def test_derivatives_through_a_patch_are_exact(x64):
    model = llama(param_dtype="float64", remat="full")
    direction = jr.normal(jr.key(5), (9, 20))

    def loss(out):
        return jnp.sum(direction * jnp.tanh(out))

    def shifted(delta, site):
        return loss(patched(model, site, jnp.add, delta)(TOKENS))

    def rest(x):
        return loss(model.logits(model.norm(model.stack[1](x))))

    # In forward mode as in reverse, where the patch is not the identity.
    delta, tangent = jr.normal(jr.key(6), (2, 2, 9, 4, 4), jnp.float64)
    step = 1e-5

    @jax.jit
    def run(delta):
        first = capture(model, "output")(TOKENS)[1]["output"][0]
        at_output = jax.grad(shifted)(jnp.zeros((2, 9, 16)), "output")[0], jax.grad(rest)(first)

        def of_heads(delta):
            return shifted(delta, "heads")

        value, forward = jax.jvp(of_heads, (delta,), (tangent,))
        reverse = jnp.sum(jax.grad(of_heads)(delta) * tangent)
        around = jax.lax.map(of_heads, jnp.stack([delta + step * tangent, delta - step * tangent]))
        return at_output, value, forward, reverse, around, of_heads(jnp.zeros_like(delta))

    at_output, value, forward, reverse, (up, down), unpatched = run(delta)
    np.testing.assert_allclose(*at_output, rtol=1e-9)
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)
    np.testing.assert_allclose(forward, (up - down) / (2 * step), rtol=1e-6)
    assert value != unpatched


def test_gradients_of_captured_values():
    """What is captured depends on the parameters, through the loop over depth."""
    model = llama()

    @eqx.filter_jit
    @eqx.filter_grad
    def gradient(model):
        return jnp.sum(capture(model, "output")(TOKENS)[1]["output"][0] ** 2)

    weight = gradient(model).stack.blocks.mlp.down_proj.weight
    assert jnp.any(weight[0] != 0)
    np.testing.assert_array_equal(weight[1], jnp.zeros_like(weight[1]))


def test_patches_apply_in_order_and_are_seen():
    x = jr.normal(jr.key(8), (9, 16))

    def plus_one(x):
        return x + 1

    def twice(x):
        return x * 2

    @eqx.filter_jit
    def run(block, site):
        models = block, patched(block, site, plus_one)
        models = *models, patched(models[1], site, twice)
        return [capture(model, site)(x)[1][site] for model in models]

    for site in ("input", "neurons", "weights", "router"):
        # One layer: later ones would see other inputs.
        block = llama(moe=MoEConfig(num_experts=4) if site == "router" else None).stack[0]
        plain, first, both = run(block, site)
        np.testing.assert_allclose(first, plain + 1, atol=1e-6)
        np.testing.assert_allclose(both, (plain + 1) * 2, atol=2e-6)


def test_weights_can_be_given():
    model = llama(window=3, layer_types="sliding")
    uniform = jnp.full((2, 4, 9, 9), 1 / 9)
    changed = replaced(model, "weights", uniform, jnp.ones(2, bool))
    _, seen = call(capture(changed, "values", "heads", "weights"), TOKENS)
    np.testing.assert_array_equal(seen["weights"], uniform)
    mean = jnp.repeat(seen["values"].mean(1), 2, axis=1)  # two queries share a value
    np.testing.assert_allclose(seen["heads"], jnp.stack([mean] * 9, axis=1), atol=1e-6)


def test_weights_are_those_of_attention_maps():
    model = transformer(TransformerEncoder)
    mask = Padding(jnp.arange(9) < 7)
    _, seen = call(capture(model, "weights", "input"), TOKENS, mask=mask)
    maps = call(attention_maps, model.stack, seen["input"][0], mask=mask)
    np.testing.assert_allclose(seen["weights"], maps, atol=1e-6)
    np.testing.assert_array_equal(maps[..., 7:], jnp.zeros((2, 4, 9, 2)))


@pytest.mark.slow
def test_dropout_is_the_same():
    model = transformer(TransformerDecoder, dropout_rate=0.3)
    out, _ = call(capture(model, "weights", "output"), TOKENS, key=jr.key(4))
    np.testing.assert_allclose(out, call(model, TOKENS, key=jr.key(4)), atol=2e-6)
    with pytest.raises(ValueError, match=r"weights are edited, but dropout_rate=0\.3 would drop"):
        patched(model, "weights", jnp.square)(TOKENS, key=jr.key(4))


STEERING = jr.normal(jr.key(7), (2, 16))


def steer(x, v):
    return x + jnp.broadcast_to(v, x.shape)


def steered():
    model = patched(llama(), "output", steer, STEERING)
    return ablated(model, jnp.ones((2, 4)).at[0, 1].set(0))


def of_heads(model):
    """For latent attention few new tokens are computed without keys and values of heads."""
    return patched(patched(model, "heads", jnp.add, jnp.ones((2, 1, 4, 4))), "keys", jnp.negative)


@pytest.mark.parametrize(
    "make", [steered, lambda: of_heads(MODELS["latent"]()[0])], ids=["plain", "latent"]
)
def test_a_patched_model_has_a_cache(make):
    model = make()

    @eqx.filter_jit
    def in_parts(model):
        first, cache = model.extend(TOKENS[:5], model.init_cache(16))
        second, cache = model.extend(TOKENS[5:8], cache)
        return jnp.concatenate([first, second, model.extend(TOKENS[8:], cache)[0]])

    expected = call(model, TOKENS)
    np.testing.assert_allclose(in_parts(model), expected, atol=1e-5)
    assert jnp.any(jnp.abs(expected - call(llama(), TOKENS)) > 0.1)


@pytest.mark.slow
def test_a_patched_model_generates():
    model, written = steered(), TOKENS
    for _ in range(3):
        written = jnp.append(written, model(written)[-1].argmax())
    out = generate(model, TOKENS, max_new_tokens=3, temperature=0.0)
    np.testing.assert_array_equal(out, written[9:])


def test_rows_are_leaves():
    """A vector that steers can be trained, and other values do not compile anew."""
    model, traced = llama(), []

    def traced_steer(x, v):
        traced.append(v)
        return steer(x, v)

    @eqx.filter_jit
    def run(model):
        return eqx.filter_grad(lambda model: model(TOKENS)[-1, 0])(model)

    for value in (0.0, 1.0):
        gradient = run(patched(model, "output", traced_steer, jnp.full((2, 16), value)))
    assert len(traced) == 1
    [row] = gradient.stack.blocks.edits[0].rows
    assert row.shape == (2, 16) and jnp.all(row != 0)


@pytest.mark.slow
def test_rows_can_be_modules():
    """A map of its own for every layer, such as a sparse autoencoder."""
    model = llama()
    maps = eqx.filter_vmap(lambda key: eqx.nn.MLP(16, 16, 8, 1, key=key))(jr.split(jr.key(9), 2))

    def through(x, function):
        return jax.vmap(function)(x)

    _, seen = call(capture(patched(model, "mlp", through, maps), "mlp", "input"), TOKENS)
    _, plain = call(capture(model, "mlp", "input"), TOKENS)
    first = jax.tree.map(lambda x: x[0] if eqx.is_array(x) else x, maps)
    np.testing.assert_allclose(seen["mlp"][0], jax.vmap(first)(plain["mlp"][0]), atol=2e-6)


@pytest.mark.slow
def test_adapters_are_within_patches():
    model = patched(llama(), "attention", jnp.negative)
    adapted = add_lora(model, 2, alpha=2.0, key=jr.key(1))
    adapted = jax.tree.map(lambda x: x + 0.1 if eqx.is_inexact_array(x) else x, adapted)
    expected = call(adapted, TOKENS)
    np.testing.assert_allclose(call(merge_lora(adapted), TOKENS), expected, atol=1e-5)


@pytest.mark.slow
def test_two_stacks():
    model = transformer(EncoderDecoder, num_decoder_layers=3)
    source = TOKENS[:6]

    @eqx.filter_jit
    def run(model):
        expected = model(source, TOKENS)
        decoder = capture(model, "cross_weights", "cross_heads")(source, TOKENS)
        encoder = capture(model, "weights", stack="encoder")(source, TOKENS)[1]
        return expected, decoder, encoder, logit_lens(model, stack="decoder")(source, TOKENS)

    expected, (out, seen), encoder, lens = run(model)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert seen["cross_weights"].shape == (3, 4, 9, 6)
    np.testing.assert_allclose(seen["cross_weights"].sum(-1), jnp.ones((3, 4, 9)), atol=1e-6)
    assert encoder["weights"].shape == (2, 4, 6, 6)
    np.testing.assert_allclose(lens[-1], expected, atol=2e-6)
    blind = patched(model, "cross_attention", jnp.zeros_like)
    np.testing.assert_allclose(
        call(blind, source, TOKENS), call(blind, OTHER[:6], TOKENS), atol=2e-6
    )
    with pytest.raises(ValueError, match=r"different shapes .*\(6, 16\) and \(9, 16\).*stack="):
        capture(model, "output")(source, TOKENS)
    with pytest.raises(ValueError, match="has 2 stacks, but it takes 1; name it"):
        logit_lens(model)


@pytest.mark.parametrize(
    "name", ["llama", *map(slow, ("mixed", "shared bias", "images", "distances"))]
)
def test_the_lens_is_a_shallower_model(name):
    model, arguments, _ = MODELS[name]()
    lens = eqx.filter_jit(logit_lens(model))(*arguments)
    np.testing.assert_allclose(lens[-1], call(model, *arguments), atol=2e-6)
    if name == "llama":
        first = Stack.from_layers([model.stack[0]])
        shallow = eqx.tree_at(lambda m: m.stack, model, first)
        np.testing.assert_allclose(lens[1], call(shallow, *arguments), atol=2e-6)
        unread = model.logits(model.norm(model.embedding(*arguments)))
        np.testing.assert_allclose(lens[0], unread, atol=2e-6)


@pytest.mark.slow
def test_images_and_methods():
    model = vit(pooling="mean")

    @eqx.filter_jit
    def run(model):
        expected = model.encode(IMAGE), model.attention_maps(IMAGE), model(IMAGE)
        return expected, capture(model.encode, "weights")(IMAGE), model.stack[0]

    (tokens, maps, scores), (out, seen), block = run(model)
    np.testing.assert_allclose(out.patches, tokens.patches, atol=2e-6)
    np.testing.assert_allclose(seen["weights"], maps, atol=1e-6)
    lens, of_tokens = call(lambda m: (logit_lens(m)(IMAGE), logit_lens(m.encode)(IMAGE)), model)
    assert lens.shape == (3, 3) and of_tokens.patches.shape == (3, 4, 16)
    np.testing.assert_allclose(lens[-1], scores, atol=1e-6)
    np.testing.assert_allclose(of_tokens.patches[-1], tokens.patches, atol=1e-6)
    _, seen = capture(block, "heads")(jnp.ones((5, 16)))
    assert seen["heads"].shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda m: capture(m), "capture: name at least one site"),
        (lambda m: capture(m, "router"), "capture: no layer of Llama has 'router'"),
        (lambda m: capture(m, "output", stack="decoder"), "Llama has no stack of blocks at 'decod"),
        (lambda m: capture(m.norm, "output"), "RMSNorm has no stack of blocks"),
        (
            lambda m: capture(eqx.filter_vmap(m), "output")(TOKENS[None]),
            "transform what capture returns instead",
        ),
        (
            lambda m: capture(m.logits, "output")(jnp.ones((3, 16))),
            "no layer that has 'output' was called",
        ),
        (
            lambda m: capture(m.extend, "output")(TOKENS, m.init_cache(16)),
            "call the model on all tokens so far",
        ),
        (
            lambda m: patched(m, "output", jnp.add, jnp.zeros((3, 16))),
            r"rows have shape \(3, 16\), but there are 2 layers with 'output'",
        ),
        (
            lambda m: patched(m, "output", jnp.sum)(TOKENS),
            r"must keep shape and dtype, float32\[9, 16\], but returned float32\[\]",
        ),
        (
            lambda m: patched(m, "output", lambda x: x.astype(jnp.bfloat16))(TOKENS),
            r"float32\[9, 16\], but returned bfloat16\[9, 16\]",
        ),
        (
            lambda m: ablated(m, jnp.ones((2, 3)))(TOKENS),
            "keep has 3 entries for a layer that has 4 heads",
        ),
        (
            lambda m: replaced(m, "output", jnp.zeros((2, 9, 16)), jnp.ones((2, 9, 16, 1), bool)),
            r"where has shape \(2, 9, 16, 1\) but values has \(2, 9, 16\)",
        ),
        (
            lambda m: replaced(m, "output", jnp.zeros((2, 9, 16)), jnp.ones((2, 3), bool)),
            r"where has shape \(2, 3\) but values has \(2, 9, 16\)",
        ),
        (
            lambda m: replaced(m, "output", jnp.zeros((2, 7, 16)), jnp.ones(2, bool))(TOKENS),
            r"values have shape \(7, 16\) in a layer but must have \(9, 16\)",
        ),
        (
            lambda m: patched(m, "output", eqx.Partial(steer, v=jnp.ones(2))),
            "the function for 'output' holds arrays, which a stack would mistake",
        ),
    ],
)
def test_mistakes_are_told(mistake, message):
    with pytest.raises(ValueError, match=message):
        mistake(llama())
