"""Attention inside real solvers, which is where a derivative that is missing shows.

A small attention network is the vector field of an ODE, the map of a fixed point, the residual of
a least-squares problem. Every result is compared with the same network written out by hand, dense,
without the library, in float64.
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

from eqx_transformer.attention import Causal, _chunked, dot_product_attention
from eqx_transformer.attention._tiles import Tiling

# One entry for every implementation.
IMPLEMENTATIONS = ["reference", "chunked"]
SEQ, HEADS, KV_HEADS, HEAD_DIM = 7, 2, 1, 4
D_MODEL = HEADS * HEAD_DIM

pytestmark = [
    # Solvers are not written for strict promotion; what they call of ours still is, elsewhere.
    pytest.mark.usefixtures("x64", "settings_of_a_user"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffrax"),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles also for a sequence of seven."""
    monkeypatch.setattr(_chunked, "tilings", lambda *_: [Tiling(3, 4)])


class Distance(eqx.Module):
    rate: jax.Array

    def __call__(self, score, q_pos, kv_pos, head):
        return score - self.rate[head] * jnp.abs(q_pos - kv_pos).astype(score.dtype)


class Network(eqx.Module):
    """`tanh(attention(x))`, a contraction for the weights chosen here."""

    wq: jax.Array
    wk: jax.Array
    wv: jax.Array
    rate: jax.Array
    implementation: str | None = eqx.field(static=True)

    def __call__(self, x):
        q = (x @ self.wq).reshape(SEQ, HEADS, HEAD_DIM)
        k = (x @ self.wk).reshape(SEQ, KV_HEADS, HEAD_DIM)
        v = (x @ self.wv).reshape(SEQ, KV_HEADS, HEAD_DIM)
        if self.implementation is None:
            out = by_hand(q, k, v, self.rate)
        else:
            out = dot_product_attention(
                q,
                k,
                v,
                mask=Causal(),
                score_mod=Distance(self.rate),
                implementation=self.implementation,
            )
        return jnp.tanh(out.reshape(SEQ, D_MODEL))


def by_hand(q, k, v, rate):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(HEAD_DIM)
    position = np.arange(SEQ)
    distance = np.abs(position[:, None] - position[None, :])
    scores = scores - rate[:, None, None] * distance
    scores = jnp.where(position[:, None] >= position[None, :], scores, -jnp.inf)
    return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores, axis=-1), v)


def network(implementation):
    keys = jr.split(jr.key(0), 4)
    kv = KV_HEADS * HEAD_DIM
    shapes = [(D_MODEL, D_MODEL), (D_MODEL, kv), (D_MODEL, kv)]
    weights = [0.3 * jr.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    return Network(*weights, jr.uniform(keys[3], (HEADS,)), implementation)


def state(seed=1):
    return jr.normal(jr.key(seed), (SEQ, D_MODEL))


def weight():
    """A random cotangent."""
    return state(9)


# Each takes a network and returns arrays to compare. --------------------------------------------


def solve(net, y, solver, adjoint):
    term = diffrax.ODETerm(lambda t, y, net: net(y) - 0.5 * y)
    controller = diffrax.PIDController(rtol=1e-6, atol=1e-8)
    solution = diffrax.diffeqsolve(
        term,
        solver,
        0.0,
        1.0,
        0.1,
        y,
        args=net,
        stepsize_controller=controller,
        adjoint=adjoint,
        max_steps=256,
    )
    return (solution.ys * weight()).sum()


def grads(loss):
    def run(net):
        gradient = eqx.filter_jit(eqx.filter_grad(lambda args: loss(*args)))
        return gradient((net, state()))

    return run


def jvps(loss):
    def run(net):
        def of_arrays(arrays, y):
            return loss(eqx.combine(arrays, net), y)

        arrays = eqx.filter(net, eqx.is_array)
        primals = (arrays, state())
        tangents = jax.tree.map(jnp.cos, primals)
        return eqx.filter_jit(lambda p, t: jax.jvp(of_arrays, p, t))(primals, tangents)

    return run


def ode_reverse(net, y):
    return solve(net, y, diffrax.Tsit5(), diffrax.RecursiveCheckpointAdjoint())


def ode_forward(net, y):
    return solve(net, y, diffrax.Tsit5(), diffrax.ForwardMode())


def ode_backsolve(net, y):
    return solve(net, y, diffrax.Tsit5(), diffrax.BacksolveAdjoint())


def ode_implicit(net, y):
    return solve(net, y, diffrax.Kvaerno5(), diffrax.RecursiveCheckpointAdjoint())


def hutchinson(net, y):
    """The divergence of a continuous normalising flow, by one probe."""
    probe = jr.rademacher(jr.key(3), y.shape).astype(y.dtype)
    return (jax.jvp(net, (y,), (probe,))[1] * probe).sum()


def fixed_point(net, y):
    solver = optimistix.FixedPointIteration(rtol=1e-11, atol=1e-11)
    found = optimistix.fixed_point(lambda z, a: 0.5 * a[0](z) + a[1], solver, y, args=(net, y))
    return (found.value * weight()).sum()


def newton(net, y):
    solver = optimistix.Newton(rtol=1e-11, atol=1e-11)
    found = optimistix.root_find(
        lambda z, a: z - 0.5 * a[0](z) - a[1], solver, y, args=(net, y), max_steps=32
    )
    return (found.value * weight()).sum()


def least_squares(solver):
    def run(net):
        target = 0.3 * state(5)

        @eqx.filter_jit
        def fit(net):
            return optimistix.least_squares(
                lambda z, net: net(z) - target, solver, state(), args=net, max_steps=8, throw=False
            ).value

        return fit(net)

    return run


def bfgs(net):
    @eqx.filter_jit
    def fit(net):
        solver = optimistix.BFGS(rtol=1e-6, atol=1e-6)
        return optimistix.minimise(
            lambda z, net: ((net(z) - 0.3) ** 2).sum() + 0.1 * (z**2).sum(),
            solver,
            state(),
            args=net,
            max_steps=16,
            throw=False,
        ).value

    return fit(net)


def hessian(net):
    """Of a function of the rates: second derivatives of a score mod's parameters."""

    def loss(rate):
        return (eqx.tree_at(lambda n: n.rate, net, rate)(state()) * weight()).sum()

    return jax.jit(jax.hessian(loss))(net.rate), jax.jit(jax.jacrev(jax.jacrev(loss)))(net.rate)


def gradients_of_a_batch(net):
    batch = jnp.stack([state(i) for i in range(3)])
    return jax.jit(jax.vmap(jax.grad(lambda y: (net(y) * weight()).sum())))(batch)


def linear_solve(net):
    """`(I - J / 2) x = b` without forming the Jacobian `J`, and its transpose."""
    _, jacobian = jax.linearize(net, state())
    structure = jax.eval_shape(lambda: state())
    operator = lineax.FunctionLinearOperator(lambda x: x - 0.5 * jacobian(x), structure)
    solver = lineax.GMRES(rtol=1e-11, atol=1e-11)
    return (
        lineax.linear_solve(operator, weight(), solver).value,
        lineax.linear_solve(operator.T, weight(), solver).value,
    )


def laplacian(net):
    """Forward over forward, in some coordinates."""
    y, directions = state(), jnp.eye(SEQ * D_MODEL)[::8].reshape(-1, SEQ, D_MODEL)

    def second(direction):
        return jax.jvp(lambda y: jax.jvp(net, (y,), (direction,))[1], (y,), (direction,))[1]

    return jax.jit(lambda: jax.vmap(second)(directions).sum(axis=0))()


# Iterations stop by tolerance, so two programs may differ by that much; the rest is rounding.
EXACT, SOLVED = 1e-10, 1e-6
PIPELINES = {
    "ODE, reverse": (grads(ode_reverse), SOLVED),
    "ODE, forward mode": (jvps(ode_forward), SOLVED),
    "ODE, backsolve": (grads(ode_backsolve), SOLVED),
    "implicit ODE, gradient": (grads(ode_implicit), SOLVED),
    "implicit ODE, jvp": (
        jvps(lambda n, y: solve(n, y, diffrax.Kvaerno5(), diffrax.ForwardMode())),
        SOLVED,
    ),
    "gradient of a Hutchinson trace": (grads(hutchinson), EXACT),
    "fixed point, implicit gradient": (grads(fixed_point), 1e-8),
    "Newton, gradient": (grads(newton), 1e-8),
    "Newton, jvp": (jvps(newton), 1e-8),
    "Levenberg-Marquardt": (
        least_squares(optimistix.LevenbergMarquardt(rtol=1e-8, atol=1e-8)),
        SOLVED,
    ),
    "Gauss-Newton": (least_squares(optimistix.GaussNewton(rtol=1e-8, atol=1e-8)), SOLVED),
    "BFGS": (bfgs, SOLVED),
    "hessian": (hessian, EXACT),
    "gradients of a batch": (gradients_of_a_batch, EXACT),
    "matrix-free linear solve": (linear_solve, 1e-8),
    "forward Laplacian": (laplacian, EXACT),
}
LONG = ("implicit ODE, jvp", "Newton, jvp", "ODE, backsolve", "Gauss-Newton")
_expected = {}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in LONG else ()) for n in PIPELINES]
)
def test_solver(name, implementation):
    run, tolerance = PIPELINES[name]
    if name not in _expected:
        _expected[name] = jax.tree.leaves(eqx.filter(run(network(None)), eqx.is_array))
    got = jax.tree.leaves(eqx.filter(run(network(implementation)), eqx.is_array))
    assert len(got) == len(_expected[name]) > 0
    for x, y in zip(got, _expected[name], strict=True):
        assert x.dtype == jnp.float64
        scale = float(jnp.abs(y).max())
        assert scale > 1e-6  # there is something to compare
        assert float(jnp.abs(x - y).max()) <= tolerance * max(scale, 1)


@pytest.mark.slow
def test_a_kernel_of_jax_fails_as_the_page_says():
    """`docs/composition.md` has a table of them; nothing is run, so no such machine is needed."""
    kernel = pytest.importorskip("jax.experimental.pallas.ops.tpu.flash_attention").flash_attention

    def attend(x):
        return kernel(x, x, x)

    gradient = jax.grad(lambda x: attend(x).sum())
    with jax.enable_x64(False):
        x = jnp.ones((1, 1, 128, 128))

        def lower(function):
            jax.jit(function).trace(x).lower(lowering_platforms=("tpu",))

        lower(gradient)
        with pytest.raises(TypeError, match="custom_vjp"):
            lower(lambda x: jax.jvp(attend, (x,), (x,)))
        with pytest.raises(NotImplementedError):
            lower(lambda x: jax.jvp(gradient, (x,), (x,)))
