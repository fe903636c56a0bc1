import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ._fields import Fields
from ._names import Into

Table = Mapping[str, str | Into]


def as_it_is(config: Any, names: Collection[str]) -> Any:
    """The configuration, whatever tensors there are."""
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of published model is called there, and what it is here.

    Arguments:

    - `model_type`: in `config.json`.
    - `architecture`: the class of transformers that has all of the weights.
    - `model`: the class of this library, or a `functools.partial` of it.
    - `read`: its configuration from theirs.
    - `write`: theirs from its configuration, as transformers 4 writes it, which 5 reads as well.
        It need not look at every field: what it says is read again and compared.
    - `differences`: the fields by which the models of two configurations compute different things.
    - `names`: the names of the weights; see `tensors`.
    - `renamed`: regular expressions for names that are not as in `names`, and what to put there.
    - `ignored`: regular expressions for names of tensors that hold no weights.
    - `tied`: names that may be there besides, and that of the tensor they must be equal to.
    - `adapt`: the configuration, given the names of the tensors that there are, where fields leave
        open whether a part is there.
    - `heads`: the same for other classes of transformers, such as with other heads, of the same
        `model_type`. `config.json` says which one it is.
    """

    model_type: str
    architecture: str
    model: Callable[..., Any]
    read: Callable[[Fields], Any]
    write: Callable[[Any], dict[str, Any]]
    differences: Callable[[Any, Any], list[str]]
    names: Callable[[Any], Table]
    renamed: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapt: Callable[[Any, Collection[str]], Any] = as_it_is
    heads: "tuple[Family, ...]" = ()

    @property
    def kind(self) -> Any:
        """The class of the model, whatever options it is built with."""
        return getattr(self.model, "func", self.model)
