"""Strict settings for every test, made before the library is imported."""

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version

import jax
import jax.random as jr
import pytest
from jaxtyping import PRNGKeyArray, install_import_hook

# Nearly all the time goes into compiling programs that run once, so LLVM may leave them as slow as
# they are, each in one piece. With `XLA_FLAGS=` (empty, or anything else) the tests compile as
# users do, and one step of continuous integration does that.
_QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):
    _QUICK.append("--xla_cpu_use_fusion_emitters=false")  # gone from later versions
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK))

# Eight devices on a CPU, for everything that is sharded.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotation of the library is checked, in every test.
with install_import_hook("eqx_transformer", "beartype.beartype"):
    import eqx_transformer
    import eqx_transformer.generation
    import eqx_transformer.inspection
    import eqx_transformer.interop
    import eqx_transformer.models
    import eqx_transformer.sharding
    import eqx_transformer.training  # noqa: F401


@pytest.fixture
def getkey() -> Callable[[], PRNGKeyArray]:
    """Fresh keys, the same ones in every run."""
    key = jr.key(2024)

    def next_key() -> PRNGKeyArray:
        nonlocal key
        key, subkey = jr.split(key)
        return subkey

    return next_key


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file() -> Iterator[None]:
    """Compiled programs are forgotten with the file: all of them together are many gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit numbers for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def settings_of_a_user() -> Iterator[None]:
    """JAX's own settings: optimisers and solvers rely on implicit promotion of dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped without one, and say so."""
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    skip = pytest.mark.skip(reason="needs a GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
