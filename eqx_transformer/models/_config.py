"""What the configurations of all models have in common."""

import abc
import dataclasses
import difflib
import functools
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config", bound="AbstractConfig")


class AbstractConfig(abc.ABC):
    """Base of the configurations: frozen, keyword-only dataclasses of plain numbers and strings,
    of tuples of these, and of other such dataclasses.

    Subclasses are decorated with `@dataclass(frozen=True, kw_only=True)`. Names and types of the
    fields are checked here, their values in `check`. Configurations that are equal build equal
    models.
    """

    # Run-time type checkers leave the constructor to the checks below, which know more: that an
    # integer is a valid rope_theta, and which name was meant.
    __no_type_check__: ClassVar[bool] = True

    # Before `__init__`, which would report an unknown name without a suggestion.
    def __new__(cls: type[Config], *args: Any, **fields: Any) -> Config:
        _check_names(cls, fields)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = _converted(getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)
            if not _fits(value, field.type):
                raise ValueError(
                    f"{type(self).__name__}: {field.name}={value!r} (of type "
                    f"{type(value).__name__}) must be {_describe(field.type)}."
                )
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {field.name}={value} must be finite.")
        self.check()

    @abc.abstractmethod
    def check(self) -> None:
        """Checks the values of the fields, alone and against each other.

        Raises:

        - `ValueError` saying what is wrong, the numbers, and what to do.
        """

    def replace(self: Config, **changes: Any) -> Config:
        """A copy with some fields changed, checked like a new one."""
        return type(self)(**{**_fields(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, down to numbers, strings, tuples and dictionaries."""
        return {name: _plain(value) for name, value in _fields(self).items()}

    @classmethod
    def from_dict(cls: type[Config], fields: Mapping[str, Any]) -> Config:
        """The configuration with these fields; those left out have their defaults.

        Raises:

        - `ValueError` for a name that is not a field, or for a missing field without a default.
        """
        return _build(cls, fields)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls: type[Config], text: str) -> Config:
        """The configuration that `to_json` wrote.

        Raises:

        - `ValueError` if `text` is not a JSON object with the right fields.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"{cls.__name__}: expected a JSON object, not {text[:40]!r}.")
        return cls.from_dict(fields)


def _check_names(cls: type, names: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"its fields are {known}."
            raise ValueError(f"{cls.__name__} has no field {name!r}; {hint}")


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {name: _plain(x) for name, x in _fields(value).items()}
        return {"kind": type(value).__name__, **fields}
    return value


def _build(cls: Any, fields: Mapping[str, Any]) -> Any:
    _check_names(cls, fields)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise ValueError(f"{cls.__name__}: {field.name!r} is missing and has no default.")
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    return cls(**{name: _converted(value, kinds[name]) for name, value in fields.items()})


def _converted(value: Any, kind: Any) -> Any:
    """`value`, or its form in JSON, as an instance of `kind` if that is possible."""
    options = [option for option, _ in _alternatives(kind)]
    if type(value) is int and float in options and int not in options:
        return float(value)
    if isinstance(value, Mapping):
        classes: dict[str, Any] = {
            x.__name__: x for x in options if isinstance(x, type) and dataclasses.is_dataclass(x)
        }
        name = value.get("kind", next(iter(classes)) if len(classes) == 1 else None)
        if classes and name not in classes:
            raise ValueError(f"kind={name!r} must be one of {list(classes)}.")
        if classes:
            return _build(classes[name], {k: x for k, x in value.items() if k != "kind"})
    if isinstance(value, list | tuple):
        for option, origin in _alternatives(kind):
            if origin is tuple:
                return tuple(_converted(x, get_args(option)[0]) for x in value)
    return value


# Cached, because the presets alone ask some thousand times when they are imported.
@functools.cache
def _alternatives(kind: Any) -> tuple[tuple[Any, Any], ...]:
    """What is allowed, and of which generic type it is."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple((option, get_origin(option)) for option in options)


def _fits(value: Any, kind: Any) -> bool:
    for option, origin in _alternatives(kind):
        if origin is Literal:
            if any(type(value) is type(x) and value == x for x in get_args(option)):
                return True
        elif origin is tuple:
            kinds = get_args(option)
            if isinstance(value, tuple) and (kinds[-1] is ... or len(value) == len(kinds)):
                if all(_fits(x, kinds[0]) for x in value):
                    return True
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return True
    return False


def _describe(kind: Any) -> str:
    words: list[str] = []
    for option, origin in _alternatives(kind):
        if origin is Literal:
            words += [repr(value) for value in get_args(option)]
        elif origin is tuple:
            kinds = get_args(option)
            count = "" if kinds[-1] is ... else f"{len(kinds)} "
            words.append(f"a tuple of {count}{_describe(kinds[0])}")
        else:
            words.append("None" if option is types.NoneType else option.__name__)
    return " or ".join(words)
