"""What attention is, as a table of cases and a NumPy function, for every implementation to match.

To put another implementation under the whole suite, add one line to `IMPLEMENTATIONS`.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import eqx_transformer.attention as attn
from eqx_transformer.attention import _chunked
from eqx_transformer.attention._derivatives import Passes
from eqx_transformer.attention._inputs import make_inputs
from eqx_transformer.attention._tiles import Tiling

from .oracles import (
    AFFINE,
    ALIBI,
    CAUSAL,
    CLOSURE,
    NO_MASK,
    NO_MOD,
    PLAIN,
    SOFT_CAP,
    Mask,
    Mod,
    compose,
    dense,
    dense_bias,
    groups,
    padding,
    predicate,
    prefix,
    relative,
    segments,
    strided,
    window,
)

# --- Tolerances ----------------------------------------------------------------------------------
# Relative to the greatest magnitude of what is compared: a few roundings of the dtype the sums
# are accumulated in, and of the dtype the result is returned in.

_ROUNDINGS = {"float64": 500, "float32": 64, "bfloat16": 4, "float16": 4}


def wider(dtype: Any) -> Any:
    """What sums are accumulated in: float32, or float64 where it is that already."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def tolerance(dtype: Any) -> float:
    dtype = jnp.dtype(dtype)
    return _ROUNDINGS[dtype.name] * float(jnp.finfo(dtype).eps)


def assert_close(actual: Any, expected: Any, dtype: Any, what: str = "") -> None:
    """PyTrees agree up to the rounding of `dtype`, infinities and zeros included."""
    paths, actual_tree = jax.tree_util.tree_flatten_with_path(actual)
    leaves, expected_tree = jax.tree.flatten(expected)
    assert actual_tree == expected_tree, (actual_tree, expected_tree)
    for (path, x), y in zip(paths, leaves, strict=True):
        name = f"{what}{jax.tree_util.keystr(path)}"
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, f"{name}: shapes {x.shape} and {y.shape}"
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite], err_msg=name)
        x, y = x[finite], y[finite]
        if y.size:
            bound = tolerance(dtype) * max(1.0, float(np.abs(y).max()))
            error = float(np.abs(x - y).max())
            assert error <= bound, f"{name}: error {error:.3g} is more than {bound:.3g}"


# --- Cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """One attention problem."""

    name: str
    q_seq: int = 11
    kv_seq: int = 13
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 6
    v_dim: int = 6
    mask: Mask = NO_MASK
    mod: Mod = NO_MOD
    scale: float | None = None
    q_positions: tuple[int, ...] | None = None
    kv_positions: tuple[int, ...] | None = None
    sinks: bool = False
    dropout_rate: float = 0.0
    fast: int = 0
    """Up to which order the fast part of the suite takes derivatives of it; 0: not at all."""

    def __str__(self) -> str:
        return self.name

    def positions(self) -> tuple[Any, Any]:
        q, kv = self.q_positions, self.kv_positions
        return (
            np.arange(self.q_seq) if q is None else np.array(q),
            np.arange(self.kv_seq) if kv is None else np.array(kv),
        )

    def allowed(self) -> Any:
        i, j = self.positions()
        return np.broadcast_to(self.mask.allows(i[:, None], j[None, :]), (self.q_seq, self.kv_seq))

    def args(self, dtype: Any = jnp.float64, seed: int = 0) -> dict[str, Any]:
        """Everything that is differentiated, of values that `dtype` represents exactly."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        wide = wider(dtype)

        def draw(shape: tuple[int, ...], out_dtype: Any) -> Any:
            return jnp.asarray(rng.normal(size=shape)).astype(dtype).astype(out_dtype)

        args = {
            "q": draw((self.q_seq, self.heads, self.head_dim), dtype),
            "k": draw((self.kv_seq, self.kv_heads, self.head_dim), dtype),
            "v": draw((self.kv_seq, self.kv_heads, self.v_dim), dtype),
            "mod": {key: draw(shape, wide) for key, shape in self.mod.params.items()},
        }
        if self.sinks:
            args["sinks"] = draw((self.heads,), wide)
        return args

    def cotangents(self, dtype: Any = jnp.float64) -> tuple[Any, Any]:
        rng = np.random.default_rng([1, *self.name.encode()])
        wide = wider(dtype)
        out = jnp.asarray(rng.normal(size=(self.q_seq, self.heads, self.v_dim))).astype(dtype)
        lse = jnp.asarray(rng.normal(size=(self.q_seq, self.heads))).astype(dtype)
        return out, lse.astype(wide)

    def options(self) -> dict[str, Any]:
        """The keyword arguments that are not differentiated."""
        options: dict[str, Any] = {"mask": self.mask.build(), "scale": self.scale}
        if self.q_positions is not None:
            options["q_positions"] = jnp.asarray(self.q_positions, jnp.int32)
        if self.kv_positions is not None:
            options["kv_positions"] = jnp.asarray(self.kv_positions, jnp.int32)
        if self.dropout_rate > 0:
            options["dropout_rate"] = self.dropout_rate
            options["dropout_key"] = jax.random.key(5)
        return options


_RNG = np.random.default_rng(0)
_HOLES = _RNG.random((11, 13)) < 0.4
_HOLES[3], _HOLES[:, 5] = False, False
_IDS = [0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1, -2, -1]
_SHUFFLED = [2, 0, -1, 1, 0, 2, 2, 1, -1, 0, 1, 5, 0]
_VALID = [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]

CASES = [
    # shapes
    Case("plain", fast=1),
    Case("mha", kv_heads=4),
    Case("mqa", kv_heads=1, fast=1),
    Case("one_head", heads=1, kv_heads=1),
    Case("square", 12, 12),
    Case("more_queries", 13, 5),
    Case("one_query", 1, 13),
    Case("one_key", 5, 1),
    Case("v_dim", v_dim=3, fast=1),
    Case("head_dim_1", head_dim=1, v_dim=2),
    Case("scale", scale=-0.7),
    Case("no_keys", 5, 0),
    Case("no_keys_sinks", 5, 0, sinks=True, fast=1),
    Case("no_keys_padding", 5, 0, mask=padding([])),
    Case("no_queries", 0, 5, fast=1),
    Case("no_queries_causal", 0, 5, mask=CAUSAL),
    # every kind of mask
    Case("causal", mask=CAUSAL),
    Case("causal_more_queries", 13, 6, mask=CAUSAL),
    Case("window_causal", mask=window(3, 0)),
    Case("window_symmetric", mask=window(2, 2), fast=1),
    Case("window_left_open", mask=window(None, 2)),
    Case("window_right_open", mask=window(1, None)),
    Case("window_unbounded", mask=window(None, None)),
    Case("window_zero", mask=window(0, 0)),
    Case("prefix", mask=prefix(6)),
    Case("prefix_traced", mask=prefix(6, traced=True)),
    Case("padding", mask=padding(_VALID), fast=1),
    Case("segments", mask=segments(_IDS)),
    Case("segments_shuffled", mask=segments(_SHUFFLED), fast=1),
    Case("segments_cross", mask=segments(_IDS[:11], _SHUFFLED)),
    Case("groups", mask=groups((3, 0, 4, 4), [[1, 0, 1, 0], [1] * 4, [0, 0, 1, 1], [0] * 4])),
    Case("strided", mask=strided(3)),
    Case("dense", mask=dense(_HOLES), fast=1),
    Case("predicate", mask=predicate(False)),
    Case("predicate_closure", mask=predicate(True), fast=1),
    # expressions
    Case("and_static", mask=CAUSAL & window(4, None)),
    Case("and_dynamic", mask=CAUSAL & segments(_IDS) & padding(_VALID)),
    Case("or", mask=CAUSAL | prefix(5)),
    Case("not", mask=~CAUSAL),
    Case("not_dynamic", mask=~(segments(_SHUFFLED) | window(1, 1))),
    Case("nested", mask=(CAUSAL & ~padding(_VALID)) | (strided(4) & ~prefix(2)), fast=1),
    Case("dilated_window", mask=window(6, 6) & strided(2)),
    # rows that attend to nothing
    Case("nothing_static", mask=prefix(0)),
    Case("nothing_dynamic", mask=padding([0] * 13)),
    Case("nothing_sinks", mask=padding([0] * 13), sinks=True, fast=1),
    Case("some_nothing", mask=groups((4, 9), [[0, 0], [1, 1]]) & CAUSAL, mod=AFFINE, fast=2),
    # positions
    Case("decode", 1, 16, mask=CAUSAL, q_positions=(9,)),
    Case("decode_window", 1, 16, mask=CAUSAL & window(4, 0), q_positions=(9,), mod=ALIBI, fast=1),
    Case("chunk", 4, 16, mask=CAUSAL, q_positions=(5, 6, 7, 8)),
    Case(
        "ring_cache",
        2,
        8,
        mask=CAUSAL & window(5, 0) & ~~prefix(99),
        mod=relative(False),
        q_positions=(10, 11),
        kv_positions=(8, 9, 10, 11, 4, 5, 6, 7),
        fast=1,
    ),
    Case(
        "empty_slots",
        3,
        9,
        mask=CAUSAL & groups((12,), [[1]]),
        q_positions=(4, 5, 6),
        kv_positions=(-1, 0, 1, -1, 2, 3, 4, 5, 6),
        fast=1,
    ),
    Case(
        "shuffled_positions",
        mask=CAUSAL & segments(_IDS),
        q_positions=(10, 3, 4, 0, 1, 9, 8, 2, 7, 5, 6),
        kv_positions=(1, 0, 12, 11, 2, 3, 9, 4, 10, 5, 6, 8, 7),
        fast=1,
    ),
    Case("outside", 4, 9, mask=padding([1] * 5), kv_positions=(-2, -1, 0, 1, 2, 3, 4, 5, 6)),
    # every score mod
    Case("soft_cap", mod=SOFT_CAP),
    Case("alibi", mod=ALIBI, mask=CAUSAL),
    Case("relative", mod=relative(False), mask=CAUSAL),
    Case("relative_bidirectional", mod=relative(True)),
    Case("dense_bias", mod=dense_bias(11, 13)),
    Case("dense_bias_short", mod=dense_bias(6, 9)),
    Case("user_module", mod=AFFINE, mask=window(3, 3)),
    Case("plain_function", mod=PLAIN),
    Case("closure", mod=CLOSURE, fast=1),
    Case("compose", mod=compose(AFFINE, SOFT_CAP, relative(True)), mask=CAUSAL),
    Case("compose_closure", mod=compose(CLOSURE, SOFT_CAP), fast=1),
    # sinks and dropout
    Case("sinks", sinks=True),
    Case("sinks_causal_mod", sinks=True, mask=CAUSAL, mod=AFFINE, fast=1),
    Case("sinks_some_nothing", sinks=True, mask=segments(_SHUFFLED), v_dim=5),
    Case("dropout", dropout_rate=0.3),
    Case(
        "dropout_everything",
        dropout_rate=0.4,
        sinks=True,
        mask=CAUSAL & padding(_VALID),
        mod=compose(SOFT_CAP, AFFINE),
        fast=2,
    ),
]

LONG_CASES = [
    # Several tiles of the sizes that are chosen by default.
    Case("long_causal", 300, 300, head_dim=8, v_dim=8, mask=CAUSAL, fast=1),
    Case(
        "long_window",
        300,
        170,
        head_dim=8,
        v_dim=4,
        mask=window(40, 3),
        mod=ALIBI,
        sinks=True,
        fast=1,
    ),
    Case("long_segments", 290, 290, kv_heads=4, mask=CAUSAL & segments(np.arange(290) // 110)),
    Case("long_plain", 130, 257, kv_heads=1, mod=AFFINE, dropout_rate=0.2),
]

NAMED = {case.name: case for case in [*CASES, *LONG_CASES]}


# --- Implementations -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """Who computes attention, and what it declares not to do."""

    name: str
    run: Callable[..., Any] | None = None
    """Called as `attention_and_lse` is; by default that function, with this one named."""
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    reverse_over_reverse: bool = True
    excluded: frozenset[str] = frozenset()
    """Names of cases that it refuses, with a `ValueError`."""

    def __str__(self) -> str:
        return self.name

    def __call__(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        run = self.run or functools.partial(attn.attention_and_lse, implementation=self.name)
        return run(q, k, v, **options)

    def of(self, case: Case, args: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
        """Runs a case on the given arrays."""
        options = case.options() if options is None else options
        mod = case.mod.build(args["mod"])
        qkv = (args["q"], args["k"], args["v"])
        return self(*qkv, score_mod=mod, sinks=args.get("sinks"), **options)


def tiles(block_q: int, block_kv: int) -> Callable[..., Any]:
    """The chunked implementation in tiles of a given size, so that short sequences have many."""

    def with_tiles(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            original = _chunked.tilings
            _chunked.tilings = lambda *_: [Tiling(block_q, block_kv)]
            try:
                return function(*args)
            finally:
                _chunked.tilings = original

        return run

    # Functions of their own, so that nothing compiled for other tile sizes is taken for these.
    passes = Passes(*map(with_tiles, (_chunked.forward, _chunked.tangent, _chunked.transpose)))
    return lambda q, k, v, **options: passes(make_inputs(q, k, v, **options))


REFERENCE = Implementation("reference")
CHUNKED = Implementation("chunked")
CHUNKED_SMALL = Implementation("chunked_4x5", tiles(4, 5))

IMPLEMENTATIONS = [REFERENCE, CHUNKED, CHUNKED_SMALL]


# --- The definition, in NumPy --------------------------------------------------------------------


def definition(case: Case, args: dict[str, Any], kept: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """Attention output and log-sum-exp in float64, one query and head at a time.

    `kept` is the factor `[heads, q_seq, kv_seq]` of dropout.
    """
    args = jax.tree.map(lambda x: np.asarray(x, np.float64), args)
    q, k, v = args["q"], args["k"], args["v"]
    scale = 1 / math.sqrt(case.head_dim) if case.scale is None else case.scale
    q_pos, kv_pos = case.positions()
    allowed = case.allowed()
    out = np.zeros((case.q_seq, case.heads, case.v_dim))
    lse = np.full((case.q_seq, case.heads), -np.inf)
    for h in range(case.heads):
        g = h // (case.heads // case.kv_heads)
        for i in range(case.q_seq):
            seen = np.nonzero(allowed[i])[0]
            scores = scale * k[seen, g] @ q[i, h]
            scores = case.mod.numpy(args["mod"], scores, q_pos[i], kv_pos[seen], h)
            sink = [args["sinks"][h]] if case.sinks else []
            everything = np.concatenate([scores, sink])
            if len(everything) == 0:
                continue
            peak = everything.max()
            total = np.exp(everything - peak).sum()
            weights = np.exp(scores - peak) / total
            if kept is not None:
                weights = weights * kept[h, i, seen]
            out[i, h] = weights @ v[seen, g]
            lse[i, h] = peak + np.log(total)
    return out, lse


def dropout_factor(case: Case) -> Any:
    """What the library multiplies attention weights with; its statistics are tested elsewhere."""
    if case.dropout_rate == 0:
        return None
    q = jnp.zeros((case.q_seq, case.heads, 1))
    k = jnp.zeros((case.kv_seq, case.kv_heads, 1))
    key = jax.random.key(5)
    inputs = make_inputs(q, k, k, dropout_rate=case.dropout_rate, dropout_key=key)
    index = (jnp.arange(n, dtype=jnp.int32) for n in (case.q_seq, case.kv_seq))
    return np.asarray(inputs.dropout(*index), np.float64)


def compiled(function: Callable[..., Any], level: int = 0) -> Callable[..., Any]:
    """`jax.jit` for code that runs once: compiling it fast matters, running it fast does not."""
    options = {"xla_backend_optimization_level": level, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options)


# --- Derivatives ---------------------------------------------------------------------------------


def scalar(case: Case, implementation: Implementation, cotangents: Any) -> Callable[[Any], Any]:
    """A scalar function of everything differentiable, through the output and the log-sum-exp."""

    def function(args: Any) -> Any:
        out, lse = implementation.of(case, args)
        lse = jnp.where(jnp.isfinite(lse), lse, 0)
        wide = wider(out.dtype)
        return (out.astype(wide) * cotangents[0].astype(wide)).sum() + (lse * cotangents[1]).sum()

    return function


def first_order(
    case: Case, implementation: Implementation
) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """Value, tangent and cotangents of a case."""

    def run(args: Any, tangents: Any, cotangents: Any) -> dict[str, Any]:
        def function(args: Any) -> Any:
            return implementation.of(case, args)

        value, pull = jax.vjp(function, args)
        _, tangent = jax.jvp(function, (args,), (tangents,))
        return {"value": value, "jvp": tangent, "vjp": pull(cotangents)[0]}

    return run


def second_order(
    case: Case, implementation: Implementation
) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """The same Hessian-vector product in three ways, of which one is a test of the others."""

    def run(args: Any, tangents: Any, cotangents: Any) -> dict[str, Any]:
        function = scalar(case, implementation, cotangents)
        gradient = jax.grad(function)

        def slope(args: Any) -> Any:
            return jax.jvp(function, (args,), (tangents,))[1]

        def product(args: Any) -> Any:
            pairs = jax.tree.map(lambda x, y: (x * y).sum(), gradient(args), tangents)
            return sum(jax.tree.leaves(pairs))

        result = {
            "forward_over_reverse": jax.jvp(gradient, (args,), (tangents,))[1],
            "reverse_over_forward": jax.grad(slope)(args),
        }
        if implementation.reverse_over_reverse:
            result["reverse_over_reverse"] = jax.grad(product)(args)
        return result

    return run


@functools.cache
def expected_first_order(case: Case, dtype: str = "float64") -> dict[str, Any]:
    """What the reference computes in float64, of inputs that `dtype` represents."""
    args, tangents, cotangents = wide_args(case, dtype)
    return compiled(first_order(case, REFERENCE))(args, tangents, cotangents)


@functools.cache
def expected_second_order(case: Case) -> Any:
    args, tangents, cotangents = wide_args(case, "float64")
    reference = replace(REFERENCE, reverse_over_reverse=False)
    result = compiled(second_order(case, reference))(args, tangents, cotangents)
    return result["forward_over_reverse"]


def all_args(case: Case, dtype: Any) -> tuple[Any, Any, Any]:
    return case.args(dtype), case.args(dtype, seed=2), case.cotangents(dtype)


def wide_args(case: Case, dtype: Any) -> tuple[Any, Any, Any]:
    return jax.tree.map(lambda x: x.astype(jnp.float64), all_args(case, dtype))


def equations(jaxpr):
    """All operations of a traced program, those of the programs inside of it included."""
    for equation in jaxpr.eqns:
        yield equation
        # The forward pass. The others begin with zeros for every gradient, wanted or not.
        is_map = equation.primitive.name == "linear_map"
        if is_map and equation.params["num_residuals"] == len(equation.invars):
            yield from equations(_inside(equation))
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def _inside(equation):
    """The program that a map of residuals alone stands for."""
    shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
    return jax.make_jaxpr(lambda *x: equation.params["forward"](list(x), []))(*shapes).jaxpr
