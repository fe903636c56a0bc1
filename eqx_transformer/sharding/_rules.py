"""Which parameter is split over which axis of a mesh, as data."""

import dataclasses
import math
import re
from typing import Any, Final, NamedTuple

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from ..models._places import Place, is_shaped, map_with_place


class Rule(NamedTuple):
    """How the parameters whose paths match are split."""

    pattern: str
    """A regular expression that is searched in the path, such as
    `"stack.blocks.attention.q_proj.weight"`."""
    spec: P
    """The mesh axes for the axes of the parameter in one layer and one expert. Those that count
    layers and experts are not among them."""
    required: bool = True
    """Whether it is an error if a mesh axis does not divide an axis of the parameter; otherwise
    such an axis is not split."""


_COLUMNS = r"(^|\.)(q|k|v|gate|up|q_up|kv_up|h|f)_proj\.(base\.)?"
_ROWS = r"(^|\.)(o|down)_proj\.(base\.)?"

TENSOR: Final = (
    Rule(_COLUMNS + r"(weight|values|b)$", P(None, "tensor")),
    Rule(_COLUMNS + r"(bias|scale|magnitude)$", P("tensor")),
    Rule(_ROWS + r"(weight|values|a)$", P("tensor", None)),
    Rule(r"(^|\.)embedding\.weight$", P("tensor", None), required=False),
    Rule(r"(^|\.)head\.weight$", P(None, "tensor"), required=False),
    Rule(r"(^|\.)head\.bias$", P("tensor"), required=False),
)
"""Tensor parallelism for all models of the library. (Shoeybi et al., 2019, "Megatron-LM".)

Projections into heads and hidden units are split by columns, those out of them by rows, so that a
branch needs one sum over devices. Embeddings and heads are split over the vocabulary if the devices
divide it.
"""


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a model and its batches are split over the axes of a mesh.

    The axes of the mesh decide the kind of parallelism: those that it lacks count as length one. By
    default, `"data"` splits the batch; `"fsdp"` the batch and the parameters, which are
    gathered where they are used (see `gathered`); `"tensor"` heads and hidden units; `"expert"` the
    experts of `MixtureOfExperts`, and the batch; `"context"` sequences (see `context_parallel`);
    `"pipe"` the layers of a `Stack`, and the batch (see `pipeline_parallel`).

    Arguments:

    - `table`: the rules, of which the first that matches a path applies. Parameters that none
        matches are not split. `sharding_table` lists those of your own that decide nothing.
    - `fsdp`: a mesh axis that also splits every large parameter, over its longest axis that is not
        split yet and is divisible. (Zhao et al., 2023; stage 3 of Rajbhandari et al., 2020.)
    - `fsdp_min_size`: the fewest elements of a large parameter, in one layer and one expert.
    - `expert`: a mesh axis that splits the axis which counts experts.
    - `context`: a mesh axis that splits sequences.
    - `pipe`: a mesh axis that splits the axis which counts layers, if that is divisible.
    - `batch`: the mesh axes that split the first axis of a batch.
    """

    table: tuple[Rule, ...] = TENSOR
    fsdp: str | None = "fsdp"
    fsdp_min_size: int = 2**18
    expert: str | None = "expert"
    context: str | None = "context"
    pipe: str | None = "pipe"
    batch: tuple[str, ...] = ("pipe", "data", "fsdp", "expert")

    def __post_init__(self) -> None:
        if self.fsdp_min_size < 0:
            raise ValueError(f"Rules: fsdp_min_size={self.fsdp_min_size} must be at least 0.")
        for rule in self.table:
            try:
                re.compile(rule.pattern)
            except re.error as error:
                raise ValueError(
                    f"Rules: the pattern {rule.pattern!r} is not a regular expression: {error}."
                ) from None

    @property
    def axes(self) -> frozenset[str]:
        """All mesh axes that the rules name."""
        names = {name for rule in self.table for entry in rule.spec for name in axis_names(entry)}
        more = (self.fsdp, self.expert, self.context, self.pipe, *self.batch)
        names.update(name for name in more if name is not None)
        return frozenset(names)

    def first(self, *rules: Rule) -> "Rules":
        """The same, with these rules before the existing ones."""
        return dataclasses.replace(self, table=(*rules, *self.table))


def specs(model: PyTree, mesh: Mesh | AbstractMesh, rules: Rules | None = None) -> PyTree[P | None]:
    """How every array of a model is split.

    Arguments:

    - `model`: the model, or only its shapes, as from `equinox.filter_eval_shape`.
    - `mesh`: the devices, or only how many, as an `AbstractMesh`.
    - `rules`: `Rules()` if not given.

    Returns:

    A PyTree of the same structure with a `PartitionSpec` for every array, and `None` for the rest.

    Raises:

    - `ValueError` if a mesh axis does not divide what a rule splits over it, if a rule has more
        axes than the parameter, or if the rules name no axis of the mesh.
    """
    rules = check_axes(mesh, rules)

    def visit(place: Place, x: Any) -> P | None:
        if not is_shaped(x):
            return None
        entries = [*leading(place, x, mesh, rules), *in_layer(place, x, mesh, rules)]
        # In the compiler's form: otherwise a second step would be compiled for the first's outputs.
        while entries and entries[-1] is None:
            entries.pop()
        return P(*entries)

    return map_with_place(visit, model)


def check_axes(mesh: Mesh | AbstractMesh, rules: Rules | None) -> Rules:
    """The rules, checked to name an axis of the mesh."""
    rules = Rules() if rules is None else rules
    if not rules.axes.intersection(mesh.axis_names):
        raise ValueError(
            f"sharding: the mesh has the axes {tuple(mesh.axis_names)} but the rules are for "
            f"{tuple(sorted(rules.axes))}; rename an axis of the mesh, or change the rules."
        )
    return rules


def leading(place: Place, x: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> list[str | None]:
    """The mesh axes that split the axes which count layers and experts."""
    entries: list[str | None] = [None] * len(place.stacked)
    size = mesh_size(mesh, rules.expert)
    for axis, kind in enumerate(place.stacked):
        if kind == "experts" and size > 1:
            if x.shape[axis] % size:
                raise ValueError(
                    f"sharding: {place.path} has {x.shape[axis]} experts, which the {size} "
                    f"devices of the mesh axis {rules.expert!r} do not divide; use as many as do."
                )
            entries[axis] = rules.expert
        stages = mesh_size(mesh, rules.pipe)
        if kind == "layers" and stages > 1 and x.shape[axis] % stages == 0:
            entries[axis] = rules.pipe
    return entries


def in_layer(
    place: Place, x: Any, mesh: Mesh | AbstractMesh, rules: Rules, *, fsdp: bool = True
) -> list[Any]:
    """The mesh axes that split the axes of a parameter in one layer."""
    path, shape = place.path, x.shape[len(place.stacked) :]
    entries: list[Any] = [None] * len(shape)
    rule = first_rule(path, rules)
    for axis, entry in enumerate(() if rule is None else rule.spec):
        assert rule is not None
        names = [name for name in axis_names(entry) if mesh_size(mesh, name) > 1]
        size = math.prod(mesh_size(mesh, name) for name in names)
        if axis >= len(shape):
            raise ValueError(
                f"sharding: the rule {rule.pattern!r} is for {len(rule.spec)} axes, but {path} has "
                f"{len(shape)} in one layer: {shape}."
            )
        if size > 1 and shape[axis] % size == 0:
            entries[axis] = names[0] if len(names) == 1 else tuple(names)
        elif size > 1 and rule.required:
            raise ValueError(
                f"sharding: {path} has {shape[axis]} elements along axis {axis} of one layer, "
                f"which the {size} devices of {entry!r} do not divide; use as many as do, or leave "
                f"it whole: rules.first(Rule({path!r}, P()))."
            )
    size = mesh_size(mesh, rules.fsdp)
    if fsdp and size > 1 and math.prod(shape) >= rules.fsdp_min_size:
        free = [i for i, n in enumerate(shape) if entries[i] is None and n % size == 0]
        if free:
            entries[max(free, key=lambda i: shape[i])] = rules.fsdp
    return entries


def first_rule(path: str, rules: Rules) -> Rule | None:
    """The rule that decides how a parameter is split, if one matches its path."""
    return next((rule for rule in rules.table if re.search(rule.pattern, path)), None)


def mesh_size(mesh: Mesh | AbstractMesh, name: str | None) -> int:
    """How many devices there are along a mesh axis; one if there is no such axis."""
    return 1 if name is None else dict(mesh.shape).get(name, 1)


def axis_names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)
