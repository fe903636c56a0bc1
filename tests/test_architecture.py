"""The structure of the package, checked: who may import whom, and what a class may do."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import equinox as eqx
import pytest

import eqx_transformer

PACKAGE = Path(eqx_transformer.__file__).parent
# A layer may import from those before it; the last ones not from one another.
LAYERS = ["_base", "attention", "nn", "stacks", "models", "top"]
LAYER = {
    "_precision": "_base",
    "_scan": "_base",
    "_text_table": "_base",
    "_unbatched": "_base",
    "attention": "attention",
    "nn": "nn",
    "stacks": "stacks",
    "models": "models",
    "generation": "top",
    "inspection": "top",
    "interop": "top",
    "sharding": "top",
    "training": "top",
}
NAMESPACES = [
    "",
    *(".attention", ".nn", ".stacks", ".models"),
    *(".generation", ".inspection", ".interop", ".sharding", ".training"),
]
# JAX outside of its stable interface, and who alone may use it.
UNSTABLE = {
    "jax.extend": {
        "attention/_linear_map.py",
        "attention/_kernels/_launch.py",
        "attention/_kernels/_pointwise.py",
    },
    "jax.interpreters": {"attention/_linear_map.py", "attention/_kernels/_launch.py"},
    "jax.experimental": {
        "attention/_kernels/_decode.py",
        "attention/_kernels/_hopper.py",
        "attention/_kernels/_hopper_tile.py",
        "attention/_kernels/_tile.py",
        "attention/_kernels/_tpu_tile.py",
        "attention/_kernels/_triton.py",
        "attention/_kernels/_triton_memory.py",
    },
    "jax._src": set(),
}
MAX_LINES = 600


def sources(package: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), ast.parse(path.read_text())


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """Absolute dotted names of what a module imports."""
    parts = ["eqx_transformer", *name.removesuffix(".py").split("/")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_of(dotted: str, modules: set[str]) -> str | None:
    """The module of the package that a dotted name is, or is in."""
    while dotted.startswith("eqx_transformer"):
        if dotted in modules:
            return dotted
        dotted = dotted.rpartition(".")[0]
    return None


def dotted_name(path: str) -> str:
    name = "eqx_transformer." + path.removesuffix(".py").replace("/", ".")
    return name.removesuffix(".__init__")


def import_violations(package: Path) -> list[str]:
    found = []
    graph: dict[str, set[str]] = {}
    parsed = dict(sources(package))
    modules = {dotted_name(path) for path in parsed}
    for path, tree in parsed.items():
        own = path.split("/")[0].removesuffix(".py")
        graph[dotted_name(path)] = set()
        for name in imported(path, tree):
            for prefix, allowed in UNSTABLE.items():
                if (name + ".").startswith(prefix + ".") and path not in allowed:
                    found.append(f"{path} imports {name}")
            target = module_of(name, modules)
            if target is None or path == "__init__.py":
                continue
            graph[dotted_name(path)].add(target)
            other = target.split(".")[1] if "." in target else ""
            if other in ("", own):
                continue
            mine, theirs = LAYERS.index(LAYER[own]), LAYERS.index(LAYER[other])
            if theirs > mine or (theirs == mine and LAYER[own] == "top"):
                found.append(f"{path} imports {name}: {own} is not above {other}")
    # Packages name their own modules, which is no circle; modules must not name one another.
    files = {dotted_name(path) for path in parsed if not path.endswith("__init__.py")}
    for start in files:
        reached, todo = set(), [x for x in graph[start] if x in files]
        while todo:
            node = todo.pop()
            if node not in reached:
                reached.add(node)
                todo += [x for x in graph[node] if x in files]
        if start in reached:
            found.append(f"{start} imports itself, through others")
    return found


def test_imports_go_one_way():
    assert import_violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("attention/_bad.py", "from ..nn import Linear\n", "attention is not above nn"),
        ("interop/_bad.py", "from ..generation import generate\n", "interop is not above"),
        ("nn/_bad.py", "import jax._src.core\n", "imports jax._src.core"),
        ("nn/_bad.py", "from jax.experimental import pallas\n", "jax.experimental.pallas"),
        ("nn/_bad.py", "from ._bad import x\n", "imports itself"),
    ],
)
def test_a_planted_import_is_found(tmp_path, path, source, message):
    for folder in ("attention", "nn", "generation", "interop"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / path).write_text(source)
    assert any(message in violation for violation in import_violations(tmp_path))


def is_abstract(cls: type) -> bool:
    names = ("__abstractmethods__", "__abstractvars__", "__abstractclassvars__")
    return any(getattr(cls, name, ()) for name in names)


def class_violations(cls: type) -> list[str]:
    """Equinox's `strict=True` checks nothing, so this does: classes are abstract or final."""
    found = []
    if is_abstract(cls) != cls.__name__.lstrip("_").startswith("Abstract"):
        found.append(f"{cls} must be named Abstract... exactly if it is abstract")
    for parent in cls.__mro__[1:]:
        if parent in (eqx.Module, object) or not issubclass(parent, eqx.Module):
            continue
        if not is_abstract(parent):
            found.append(f"{cls} inherits from the concrete {parent}")
        for name, function in vars(parent).items():
            if inspect.isfunction(function) and not name.startswith("__") and name in vars(cls):
                if not getattr(function, "__isabstractmethod__", False):
                    found.append(f"{cls} overrides {parent.__name__}.{name}")
    return found


def all_modules() -> list[str]:
    walk = pkgutil.walk_packages(eqx_transformer.__path__, "eqx_transformer.")
    return [info.name for info in walk]


def test_classes_are_abstract_or_final():
    for name in all_modules():
        importlib.import_module(name)

    def subclasses(cls: type) -> Iterator[type]:
        for sub in cls.__subclasses__():
            yield sub
            yield from subclasses(sub)

    ours = {c for c in subclasses(eqx.Module) if c.__module__.startswith("eqx_transformer")}
    assert len(ours) > 20
    assert [v for cls in ours for v in class_violations(cls)] == []


def test_a_planted_subclass_is_found():
    class Parent(eqx.Module):
        def method(self):
            return 1

    class Child(Parent):
        def method(self):
            return 2

    assert len(class_violations(Child)) == 2


def public_names() -> Iterator[tuple[str, str, object]]:
    for namespace in NAMESPACES:
        module = importlib.import_module("eqx_transformer" + namespace)
        for name, value in vars(module).items():
            if not name.startswith("_") and not inspect.ismodule(value):
                yield module.__name__, name, value


def test_public_names_are_documented():
    for module, name, value in public_names():
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_no_public_signature_takes_any_keyword():
    for module, name, value in public_names():
        if getattr(value, "_is_protocol", False):
            continue  # says what others have; its own __init__ is typing's
        if inspect.isclass(value) and value.__module__.startswith("eqx_transformer"):
            members = [(f"{name}.{k}", v) for k, v in vars(value).items() if inspect.isfunction(v)]
            functions = [(k, v) for k, v in members if k.split(".")[1] in ("__init__", "__call__")]
        else:
            functions = [(name, value)] if inspect.isfunction(value) else []
        for label, function in functions:
            kinds = {p.kind for p in inspect.signature(function).parameters.values()}
            assert inspect.Parameter.VAR_KEYWORD not in kinds, f"{module}: {label} takes **kwargs"


def test_files_are_short_and_named_for_a_concept():
    for path in PACKAGE.rglob("*.py"):
        assert path.stem.strip("_") not in ("utils", "util", "helpers", "common", "misc"), path
        assert len(path.read_text().splitlines()) <= MAX_LINES, f"{path} wants a second look"


def test_no_failure_is_swallowed():
    for path, tree in sources(PACKAGE):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                names = (
                    {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                    if node.type
                    else {""}
                )
                assert not names & {"", "Exception", "BaseException"} or any(
                    isinstance(n, ast.Raise) for n in ast.walk(node)
                ), f"{path}:{node.lineno} catches everything"


def test_importing_runs_nothing_on_a_device():
    """A library that makes arrays when imported decides the platform for its user."""
    for path, tree in sources(PACKAGE):
        for node in tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
                made = [ast.unparse(c.func) for c in calls]
                assert not [m for m in made if m.startswith("jnp.")], f"{path}:{node.lineno}"
