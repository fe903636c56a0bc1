"""Blocks and models inside real solvers; `test_pipelines.py` has the attention function on its own.

Every kind of block and model goes through one solver of diffrax, with one of its adjoints, and
through one solver of optimistix or products of second-order methods; every solver, adjoint and
product has at least one kind. Float64, with tiled attention. What is expected comes from the dense
attention, whose derivatives are JAX's own, in reverse mode only, with every solver written out as a
loop of equal steps.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax
import numpy as np
import optimistix
import pytest

from eqx_transformer.attention import dot_product_attention
from eqx_transformer.models import (
    AnchorTransformer,
    AnchorTransformerConfig,
    DiT,
    DiTConfig,
    Llama,
    LlamaConfig,
    Transolver,
    TransolverConfig,
)
from eqx_transformer.nn import GatedMLP, MixtureOfExperts, RoPE
from eqx_transformer.stacks import (
    Source,
    decoder_block,
    encoder_block,
)

SEQ, D_MODEL = 5, 8
SIZES = {"d_model": D_MODEL, "num_heads": 2}
MODEL = {**SIZES, "num_layers": 2, "d_ff": 8}

pytestmark = [
    # Solvers are not written for strict promotion; what they call of ours still is, elsewhere.
    pytest.mark.usefixtures("x64", "settings_of_a_user"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffrax"),
]


# Kinds: each takes the name of an implementation of attention, and returns a Module and a function
# of it and a sequence, to a sequence of the same size. --------------------------------------------


def plain(module, x):
    return module(x)


def with_source(module, x):
    return module(x, context=Source(jr.normal(jr.key(7), (4, 6))))


def attend(implementation):
    return {"attention_fn": eqx.Partial(dot_product_attention, implementation=implementation)}


def transformer_block(implementation):
    options = {"causal": True, "rope": RoPE(), "num_kv_heads": 1, "gated": True}
    return encoder_block(8, 2, 8, **options, **attend(implementation), key=jr.key(0)), plain


def parallel_block(implementation):
    options = {"layout": "parallel", "window": 2}
    return encoder_block(8, 2, 8, **options, **attend(implementation), key=jr.key(0)), plain


def mixture_block(implementation):
    expert = eqx.Partial(GatedMLP, D_MODEL, 4)
    mlp = MixtureOfExperts(D_MODEL, 3, expert, top_k=2, key=jr.key(1))
    return encoder_block(8, 2, 8, mlp=mlp, **attend(implementation), key=jr.key(0)), plain


def decoder(implementation):
    block = decoder_block(8, 2, 8, d_memory=6, **attend(implementation), key=jr.key(0))
    return block, with_source


def llama(implementation):
    """As a function of the vectors of its tokens."""
    options = {"max_len": 8, "num_kv_heads": 1, "attention_implementation": implementation}
    config = LlamaConfig(vocab_size=SEQ, **MODEL, **options)

    def call(model, x):
        model = eqx.tree_at(lambda m: m.embedding.weight, model, x)
        return model.hidden(jnp.arange(SEQ))

    return Llama(config, key=jr.key(0)), call


def as_image(x):
    """Forty numbers as five patches of 2 by 4 pixels."""
    return x.reshape(1, 2, 20)


def diffusion(implementation):
    image = {"image_size": (2, 20), "patch_size": (2, 4), "num_channels": 1}
    options = {"num_classes": None, "attention_implementation": implementation}
    model = DiT(DiTConfig(**image, **MODEL, **options), key=jr.key(0))

    # It begins as zero, which would be no test.
    def parts(model):
        return model.head.weight, model.stack.blocks.modulation.proj.weight

    fill = [0.3 * jr.normal(jr.key(i), x.shape) for i, x in enumerate(parts(model))]
    model = eqx.tree_at(parts, model, fill)
    return model, lambda model, x: model(as_image(x), jnp.asarray(0.3)).reshape(x.shape)


def transolver(implementation):
    """Attention to slices, which has one implementation."""
    config = TransolverConfig(num_features=8, out_features=8, num_slices=3, **MODEL)
    return Transolver(config, key=jr.key(0)), plain


def anchors(implementation):
    config = AnchorTransformerConfig(
        num_dims=2, branches=("a", "b"), out_features=(8, 8), wavelength_base=10.0, **MODEL
    )

    def call(model, x):
        """Columns are the places of anchors, and of what is asked for."""
        at_anchors, at_queries = model({"a": x[:, :2], "b": x[:, 2:4]}, {"a": x[:, 4:6]})
        return at_anchors["a"] + at_anchors["b"] + at_queries["a"]

    return AnchorTransformer(config, key=jr.key(0)), call


KINDS = {
    "TransformerBlock": (transformer_block, "backsolve", "Hessian"),
    "ParallelBlock": (parallel_block, "Kvaerno5", "Gauss-Newton"),
    "DecoderBlock": (decoder, "direct", "Jacobian"),
    "mixture of experts": (mixture_block, "forward", "Laplacian"),
    "Llama": (llama, "Tsit5", "BFGS"),
    "DiT": (diffusion, "direct", "Newton"),
    "Transolver": (transolver, "stochastic", "fixed point"),
    "AnchorTransformer": (anchors, "forward", "Levenberg-Marquardt"),
}
"""Who makes it, in which of `EQUATIONS` it is, and in which of `SOLVERS` or `PRODUCTS`."""
QUICK = ("TransformerBlock", "Llama")
"""Those that are not of the long tail."""


def kinds_in(table):
    """Every kind with what it is in, of a table."""
    return [
        pytest.param(kind, name, marks=() if kind in QUICK else pytest.mark.slow)
        for kind, (_, *names) in KINDS.items()
        for name in names
        if name in table
    ]


def state(seed=1):
    return jr.normal(jr.key(seed), (SEQ, D_MODEL))


def weight():
    """A random cotangent."""
    return state(9)


def make(kind, implementation):
    """The weights of a kind, and the function of them and a sequence that it is."""
    module, call = KINDS[kind][0](implementation)
    weights, rest = eqx.partition(module, eqx.is_inexact_array)
    # A list of arrays: diffrax's BacksolveAdjoint fails on arguments with an empty tuple in them,
    # which a function with options (`eqx.Partial`) has.
    leaves, structure = jax.tree.flatten(weights)

    def function(leaves, x):
        model = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
        # Bounded, and a contraction, so that equations have one solution.
        return 0.2 * jnp.tanh(call(model, x))

    return leaves, function


def close(got, expected, tolerance):
    """Arrays one by one, to `tolerance` times the largest number or one."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected) > 0
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == y.dtype == np.float64
        assert float(jnp.abs(x - y).max()) <= tolerance * max(float(jnp.abs(y).max()), 1)
    assert max(float(jnp.abs(y).max()) for y in expected) > 1e-3  # there is something to compare


def gradient(solve, arrays, x):
    """Of a number that the end of a solver is, by all weights and the beginning."""
    return jax.jit(jax.grad(lambda inputs: jnp.vdot(weight(), solve(*inputs))))((arrays, x))


# Differential equations ---------------------------------------------------------------------------

END = 0.5
TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-9)
CHECKPOINTS = diffrax.RecursiveCheckpointAdjoint()
EQUATIONS = {
    "Tsit5": (diffrax.Tsit5(), CHECKPOINTS, TIGHT),
    "Kvaerno5": (diffrax.Kvaerno5(), CHECKPOINTS, TIGHT),
    "backsolve": (diffrax.Tsit5(), diffrax.BacksolveAdjoint(), TIGHT),
    "forward": (diffrax.Dopri8(), diffrax.ForwardMode(), TIGHT),
    "direct": (diffrax.Tsit5(), diffrax.DirectAdjoint(), diffrax.ConstantStepSize()),
    "stochastic": (diffrax.Heun(), CHECKPOINTS, diffrax.ConstantStepSize()),
}
"""Solvers and adjoints."""


def velocity(f):
    return lambda t, y, arrays: f(arrays, y) - 0.5 * y


def unrolled(f, arrays, y):
    """Runge and Kutta's method, in 64 equal steps."""
    field, h = velocity(f), END / 64
    nodes, weights = jnp.asarray([0, 0.5, 0.5, 1]), jnp.asarray([1, 2, 2, 1]) / 6

    def step(y, _):
        def stage(carry, node_and_weight):
            k, total = carry
            node, share = node_and_weight
            k = field(None, y + h * node * k, arrays)
            return (k, total + h * share * k), None

        (_, moved), _ = jax.lax.scan(stage, (0 * y, y), (nodes, weights))
        return moved, None

    return jax.lax.scan(step, y, length=64)[0]


def path():
    return diffrax.VirtualBrownianTree(0.0, END, tol=1e-3, shape=(), key=jr.key(5))


def unrolled_stochastic(f, arrays, y):
    """Heun's method in eight steps; one Brownian motion, that multiplies what moves the state."""
    field, times = velocity(f), jnp.linspace(0, END, 9)

    def move(y, t0, t1):
        noise = path().evaluate(t0, t1)
        return (t1 - t0) * field(None, y, arrays) + noise * f(arrays, y)

    def step(y, interval):
        first = move(y, *interval)
        return y + 0.5 * (first + move(y + first, *interval)), None

    return jax.lax.scan(step, y, (times[:-1], times[1:]))[0]


@pytest.mark.parametrize(("kind", "name"), kinds_in(EQUATIONS))
def test_differential_equation(kind, name):
    (solver, adjoint, controller), stochastic = EQUATIONS[name], name == "stochastic"
    arrays, f = make(kind, "chunked")
    y, constant = state(), isinstance(controller, diffrax.ConstantStepSize)

    def solve(arrays, y):
        terms = diffrax.ODETerm(velocity(f))
        if stochastic:
            noise = diffrax.ControlTerm(lambda t, y, arrays: f(arrays, y), path())
            terms = diffrax.MultiTerm(terms, noise)
        steps = 8 if stochastic else 16
        solution = diffrax.diffeqsolve(
            terms,
            solver,
            t0=0.0,
            t1=END,
            dt0=END / steps if constant else None,
            y0=y,
            args=arrays,
            stepsize_controller=controller,
            adjoint=adjoint,
            max_steps=steps if constant else 256,
        )
        return solution.ys[-1]

    reference = unrolled_stochastic if stochastic else unrolled
    dense, g = make(kind, "reference")
    expected = gradient(lambda arrays, y: reference(g, arrays, y), dense, y)
    # The stochastic one takes the steps of its reference.
    tolerance = 1e-9 if stochastic else 1e-6
    if not isinstance(adjoint, diffrax.ForwardMode):
        close(gradient(solve, arrays, y), expected, tolerance)
        return
    tangents = jax.tree.map(jnp.cos, (arrays, y))
    _, moved = jax.jit(lambda *inputs: jax.jvp(solve, *inputs))((arrays, y), tangents)
    products = jax.tree.map(jnp.vdot, expected, tangents)
    close(jnp.vdot(weight(), moved), sum(jax.tree.leaves(products)), tolerance)


# Fixed points, roots and minima -------------------------------------------------------------------


def fixed_point(f, arrays, x):
    """By iteration; the gradient from products with the Jacobian's transpose only."""
    return optimistix.fixed_point(
        lambda z, inputs: f(inputs[0], z) + inputs[1],
        optimistix.FixedPointIteration(rtol=1e-12, atol=1e-12),
        x,
        args=(arrays, x),
        adjoint=optimistix.ImplicitAdjoint(lineax.GMRES(rtol=1e-12, atol=1e-12)),
    ).value


def root(f, arrays, x):
    """By Newton's method; the gradient by its linear solver."""
    return optimistix.root_find(
        lambda z, inputs: f(inputs[0], z) + inputs[1] - z,
        optimistix.Newton(rtol=1e-12, atol=1e-12),
        x,
        args=(arrays, x),
    ).value


def residuals(f, arrays, z):
    """That cannot all be zero."""
    return z - f(arrays, z) - state(5), 0.1 * z


def least_squares(solver):
    def solve(f, arrays, x):
        def function(z, arrays):
            return residuals(f, arrays, z)

        return optimistix.least_squares(function, solver, x, args=arrays, max_steps=128).value

    return solve


def minimum(f, arrays, x):
    def function(z, arrays):
        return sum(jnp.sum(r**2) for r in residuals(f, arrays, z))

    solver = optimistix.BFGS(rtol=1e-10, atol=1e-10)
    return optimistix.minimise(function, solver, x, args=arrays, max_steps=256).value


SOLVERS = {
    "Levenberg-Marquardt": least_squares(optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)),
    "fixed point": fixed_point,
    "BFGS": minimum,
    "Newton": root,
    "Gauss-Newton": least_squares(optimistix.GaussNewton(rtol=1e-10, atol=1e-10)),
}


@pytest.mark.parametrize(("kind", "name"), kinds_in(SOLVERS))
def test_fixed_point_root_or_minimum(kind, name):
    solve = SOLVERS[name]
    arrays, f = make(kind, "chunked")
    dense, g = make(kind, "reference")
    x = state()
    if name in ("fixed point", "Newton"):

        def iterated(arrays, x):
            return jax.lax.scan(lambda z, _: (g(arrays, z) + x, None), x, length=60)[0]

        expected = gradient(iterated, dense, x)
        close(gradient(lambda arrays, x: solve(f, arrays, x), arrays, x), expected, 1e-8)
        return
    z = jax.jit(lambda arrays, x: solve(f, arrays, x))(arrays, x)

    def loss(z):
        return sum(jnp.sum(r**2) for r in residuals(g, dense, z))

    slope = jax.jit(jax.grad(loss))
    assert float(jnp.abs(slope(x)).max()) > 0.1
    assert float(jnp.abs(slope(z)).max()) < 1e-6


# Products of second-order methods, and linear systems ---------------------------------------------


def gauss_newton(function, x, v):
    return jax.vjp(function, x)[1](jax.jvp(function, (x,), (v,))[1])[0]


def hutchinson(function, x, v):
    """An estimate of the trace of the Jacobian."""
    return jnp.vdot(v, jax.jvp(function, (x,), (v,))[1])


def linear_solve(transposed):
    """Of `(I - J) u = v`, with products only."""

    def solve(function, x, v):
        _, linear = jax.linearize(function, x)
        structure = jax.ShapeDtypeStruct(x.shape, x.dtype)
        operator = lineax.FunctionLinearOperator(lambda u: u - linear(u), structure)
        solver = lineax.GMRES(rtol=1e-12, atol=1e-12)
        return lineax.linear_solve(operator.T if transposed else operator, v, solver).value

    return solve


def hessian_vector(function, x, v):
    return jax.jvp(jax.grad(lambda x: jnp.vdot(v, function(x))), (x,), (v,))[1]


def gradient_of_hutchinson(function, x, v):
    return jax.grad(lambda x: hutchinson(function, x, v))(x)


def laplacian(function, x, v):
    """Forward over forward, in every direction."""

    def second(direction):
        def first(x):
            return jax.jvp(function, (x,), (direction,))[1]

        return jnp.vdot(v, jax.jvp(first, (x,), (direction,))[1])

    return jax.vmap(second)(jnp.eye(x.size).reshape(-1, *x.shape)).sum()


PRODUCTS = {
    "Hessian": {
        hessian_vector: lambda J, H, v: H @ v,
        gradient_of_hutchinson: lambda J, H, v: H @ v,  # since its `v` is the same
    },
    "Jacobian": {
        gauss_newton: lambda J, H, v: J.T @ (J @ v),
        hutchinson: lambda J, H, v: v @ J @ v,
        linear_solve(False): lambda J, H, v: np.linalg.solve(np.eye(len(v)) - J, v),
        linear_solve(True): lambda J, H, v: np.linalg.solve(np.eye(len(v)) - J.T, v),
    },
    "Laplacian": {laplacian: lambda J, H, v: np.trace(H)},
}
"""What each is, given the Jacobian, the Hessian of `v f(x)` and `v`."""


@pytest.mark.parametrize(("kind", "name"), kinds_in(PRODUCTS))
def test_products(kind, name):
    arrays, f = make(kind, "chunked")
    dense, g = make(kind, "reference")
    x, v = state(), state(3)

    @jax.jit
    def products(arrays):
        return [product(lambda x: f(arrays, x), x, v) for product in PRODUCTS[name]]

    @jax.jit
    def matrices(arrays):
        def function(flat):
            return g(arrays, flat.reshape(x.shape)).reshape(-1)

        jacobian = jax.jacrev(function)
        hessian = jax.jacrev(lambda flat: v.reshape(-1) @ jacobian(flat))
        return jacobian(x.reshape(-1)), hessian(x.reshape(-1))

    jacobian, hessian = map(np.asarray, matrices(dense))
    flat = np.asarray(v).reshape(-1)
    for got, expected in zip(products(arrays), PRODUCTS[name].values(), strict=True):
        want = expected(jacobian, hessian, flat)
        np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, rtol=1e-8, atol=1e-9)


def test_nothing_is_left_out():
    met = [name for _, *names in KINDS.values() for name in names]
    assert set(met) == {*EQUATIONS, *SOLVERS, *PRODUCTS}
    for _, equation, other in KINDS.values():
        assert equation in EQUATIONS and other not in EQUATIONS
