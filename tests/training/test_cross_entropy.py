"""The chunked cross-entropy is the dense one, in value, every derivative, and not in memory."""

import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from eqx_transformer.models import Llama, LlamaConfig
from eqx_transformer.nn import Embedding, Linear
from eqx_transformer.training import cross_entropy_from_hidden

ROWS, D_MODEL, VOCAB = 11, 4, 7


def dense(head, hidden, targets, valid, smoothing, z_loss):
    """The formula, with all logits at once."""
    logits = head(hidden)
    log_p = jax.nn.log_softmax(logits)
    goal = (1 - smoothing) * jax.nn.one_hot(targets, VOCAB, dtype=logits.dtype) + smoothing / VOCAB
    loss = -(goal * log_p).sum(-1) + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.where(valid, loss, 0)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_value_and_every_derivative(getkey, x64, chunk_size):
    hidden = jr.normal(getkey(), (ROWS, D_MODEL), jnp.float64)
    head = Linear(D_MODEL, VOCAB, use_bias=True, dtype=jnp.float64, key=getkey())
    targets = jr.randint(getkey(), (ROWS,), 0, VOCAB)
    valid = jnp.arange(ROWS) % 5 != 1
    cotangent = jr.normal(getkey(), (ROWS,), jnp.float64)
    primals = (head, hidden)
    tangents = jax.tree.map(lambda x: jr.normal(getkey(), x.shape, x.dtype), primals)

    def chunked(primals):
        head, hidden = primals
        capped = lambda x: 2 * jnp.tanh(head(x))  # noqa: E731
        options = {"label_smoothing": 0.2, "z_loss": 0.3, "chunk_size": chunk_size}
        return cross_entropy_from_hidden(capped, hidden, targets, valid=valid, **options)

    def reference(primals):
        head, hidden = primals
        return dense(lambda x: 2 * jnp.tanh(head(x)), hidden, targets, valid, 0.2, 0.3)

    @eqx.filter_jit
    def derivatives(losses):
        def total(primals):
            return jnp.vdot(cotangent, jnp.sin(losses(primals)))

        def slope(primals):
            return jax.jvp(total, (primals,), (tangents,))[1]

        forward_over_reverse = jax.jvp(jax.grad(total), (primals,), (tangents,))[1]
        return (
            losses(primals),
            jax.jvp(losses, (primals,), (tangents,))[1],
            jax.grad(total)(primals),
            forward_over_reverse,
            jax.grad(slope)(primals),
        )

    got, expected = derivatives(chunked), derivatives(reference)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_model_and_its_logits(getkey):
    """`hidden` and `logits` of a model with a soft cap and tied embeddings, for a batch."""
    config = LlamaConfig(
        vocab_size=VOCAB, d_model=8, num_layers=1, num_heads=2, d_ff=8, tie_embeddings=True
    )
    model = Llama(config.replace(logit_soft_cap=0.5), key=getkey())
    tokens = jr.randint(getkey(), (2, 6), 0, VOCAB)

    @eqx.filter_jit
    def both(model, tokens):
        hidden = jax.vmap(model.hidden)(tokens[:, :-1])
        got = cross_entropy_from_hidden(model.logits, hidden, tokens[:, 1:], chunk_size=3)
        scores = jax.nn.log_softmax(jax.vmap(model)(tokens[:, :-1]))
        return got, -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]

    got, expected = both(model, tokens)
    assert got.shape == (2, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_does_not_count_leaves_no_trace(getkey):
    table = Embedding(VOCAB, D_MODEL, key=getkey())
    hidden = jr.normal(getkey(), (5, D_MODEL)).at[1].set(jnp.nan)
    targets = jnp.asarray([0, -100, 6, 7, -1])
    valid = jnp.asarray([True, False, True, True, False])

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def f(primals):
        table, hidden = primals
        losses = cross_entropy_from_hidden(table.attend, hidden, targets, valid=valid, chunk_size=2)
        return jnp.nansum(losses), losses

    (_, losses), (d_table, d_hidden) = f((table, hidden))
    # A target that there is not is no result; where nothing counts it does not matter.
    np.testing.assert_array_equal(jnp.isnan(losses), [False, False, False, True, False])
    assert losses[1] == losses[4] == 0
    assert jnp.isfinite(d_table.weight).all()
    assert not d_hidden[1].any() and not d_hidden[4].any() and d_hidden[0].any()


def test_narrow_parameters_get_wide_sums(getkey):
    """The gradient of a bfloat16 head is rounded once, not once a chunk."""
    head = Linear(D_MODEL, VOCAB, dtype=jnp.bfloat16, key=getkey())
    hidden = jr.normal(getkey(), (512, D_MODEL), jnp.bfloat16)
    targets = jnp.zeros(512, jnp.int32)

    @eqx.filter_jit
    def gradient(head, chunk_size):
        def total(head):
            return cross_entropy_from_hidden(head, hidden, targets, chunk_size=chunk_size).sum()

        return jax.grad(total)(head).weight

    whole, parts = gradient(head, None), gradient(head, 2)
    assert parts.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (parts, whole)), rtol=2**-7)


def test_memory_does_not_grow_with_the_logits():
    def temporary(rows, vocab_size):
        @jax.jit
        def f(weight, hidden, targets):
            def total(weight, hidden):
                losses = cross_entropy_from_hidden(
                    lambda x: x @ weight, hidden, targets, chunk_size=64
                )
                return losses.sum()

            return jax.grad(total, argnums=(0, 1))(weight, hidden)

        shapes = [(4, vocab_size), (rows, 4)]
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        compiled = f.lower(*args, jax.ShapeDtypeStruct((rows,), jnp.int32)).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = temporary(1024, 4096), temporary(4096, 4096)
    dense_logits = 4096 * 4096 * 4
    assert few < dense_logits / 8
    assert many - few < dense_logits / 64  # some numbers a row, and none for each logit


def test_vmap_keeps_one_loop_and_one_head(getkey):
    hidden, targets = jnp.zeros((3, 8, D_MODEL)), jnp.zeros((3, 8), jnp.int32)
    head = Linear(D_MODEL, VOCAB, key=getkey())

    def f(head, hidden, targets):
        return cross_entropy_from_hidden(head, hidden, targets, chunk_size=2)

    program = str(jax.make_jaxpr(lambda *x: jax.vmap(f, (None, 0, 0))(*x))(head, hidden, targets))
    assert program.count(" scan[") == 1
    assert f"[3,{D_MODEL},{VOCAB}]" not in program and f"[3,8,{VOCAB}]" not in program


def test_no_rows_no_losses(getkey):
    head = Linear(D_MODEL, VOCAB, key=getkey())
    assert cross_entropy_from_hidden(head, jnp.ones((0, 4)), jnp.ones(0, int)).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1}, "label_smoothing=1 must be at least 0 and below 1"),
        ({"z_loss": -1e-4}, "z_loss=-0.0001 must not be negative"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"head": lambda x: x.sum()}, r"head returned \(\) for \(3, 4\)"),
    ],
)
def test_errors(options, message):
    head = options.pop("head", lambda x: x)
    with pytest.raises(ValueError, match=message):
        cross_entropy_from_hidden(head, jnp.ones((3, 4)), jnp.zeros(3, int), **options)


def test_targets_that_were_not_shifted(getkey):
    # As it is where no types are checked at run time.
    function = inspect.unwrap(cross_entropy_from_hidden)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 4\) and targets has \(4,\)"):
        function(lambda x: x, jnp.ones((3, 4)), jnp.zeros(4, int))
