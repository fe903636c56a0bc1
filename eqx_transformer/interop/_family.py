import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ._fields import Fields
from ._names import Into

Table = Mapping[str, str | Into]


def as_it_is(config: Any, names: Collection[str]) -> Any:
    """The configuration unchanged, whatever tensors there are."""
    return config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How one kind of published model is described there, and what it is here.

    Arguments:

    - `model_type`: in `config.json`.
    - `architecture`: the class of transformers that has all of the weights.
    - `model`: the class of this library, or a `functools.partial` of it.
    - `read`: its configuration from theirs.
    - `write`: theirs from its configuration, as transformers 4 writes it, which 5 reads as well.
        It need not check every field: the result is read again and compared.
    - `differences`: the fields by which the models of two configurations compute different things.
    - `names`: the names of the weights; see `tensors`.
    - `renamed`: regular expressions for names that differ from `names`, and their replacements.
    - `ignored`: regular expressions for names of tensors that hold no weights.
    - `tied`: names of further tensors that may exist, and of those that they must be equal to.
    - `adapt`: adjusts the configuration to the names of the tensors in the files, if fields leave
        open whether a part exists.
    - `heads`: the same for other classes of transformers with the same `model_type`, such as those
        with other heads. `config.json` says which one it is.
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
        """The class of the model, without the options it is built with."""
        return getattr(self.model, "func", self.model)
