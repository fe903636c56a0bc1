"""Named groups of tokens, and which of them attend to which."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from ..attention import TokenGroups


@dataclasses.dataclass(frozen=True)
class TokenSpec:
    """A group of consecutive tokens.

    Arguments:

    - `name`: of the group; any.
    - `size`: how many tokens of the input belong to it. `None`: it is not in the input, and groups
        that attend to it use its keys and values in a cache.

    Raises:

    - `ValueError` if the name is empty or the size negative.
    """

    name: str
    size: int | None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("TokenSpec: the name is empty; patterns could not refer to it.")
        if self.size is not None and self.size < 0:
            raise ValueError(
                f"TokenSpec: size={self.size} of {self.name!r} is negative; None says that the "
                "group is not in the input."
            )

    @classmethod
    def from_dict(cls, token_dict: Mapping[str, int | None]) -> "TokenSpec":
        """The group of `{name: size}`.

        Raises:

        - `ValueError` if there is not exactly one entry.
        """
        if len(token_dict) != 1:
            raise ValueError(
                f"TokenSpec.from_dict: {dict(token_dict)} has {len(token_dict)} entries but must "
                "have 1, {name: size}."
            )
        [(name, size)] = token_dict.items()
        return cls(name, size)

    def to_dict(self) -> dict[str, int | None]:
        """`{name: size}`."""
        return {self.name: self.size}


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
    """Every token of the query groups attends to all tokens of the key-value groups, and no others.

    Arguments:

    - `query_tokens`: names of the groups that attend.
    - `key_value_tokens`: names of the groups that they attend to.

    Raises:

    - `ValueError` if there are no names, or one of them twice.
    """

    query_tokens: Sequence[str]
    key_value_tokens: Sequence[str]

    def __post_init__(self) -> None:
        for field in ("query_tokens", "key_value_tokens"):
            names = getattr(self, field)
            if isinstance(names, str):
                raise ValueError(
                    f"AttentionPattern: {field}={names!r} is one name but must be a sequence of "
                    f"them: ({names!r},)."
                )
            object.__setattr__(self, field, tuple(names))
            _check_distinct("AttentionPattern", field, names)
            if not names:
                raise ValueError(f"AttentionPattern: {field} is empty; leave the pattern out.")


@dataclasses.dataclass(frozen=True)
class AnchorBranch:
    """A part of a problem (the surface, the volume) whose tokens are anchors or queries.

    Anchors are attended to; queries only attend, so each is independent of the others.

    Arguments:

    - `anchors`: name of the group of anchors.
    - `queries`: names of the groups of queries.
    """

    anchors: str
    queries: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.queries, str):
            raise ValueError(
                f"AnchorBranch: queries={self.queries!r} is one name but must be a sequence of "
                f"them: ({self.queries!r},)."
            )
        object.__setattr__(self, "queries", tuple(self.queries))
        _check_distinct("AnchorBranch", "names", self.tokens)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The names of its groups, anchors first."""
        return (self.anchors, *self.queries)


def self_patterns(branches: Sequence[AnchorBranch]) -> tuple[AttentionPattern, ...]:
    """Every branch attends to its own anchors. (Alkin et al., AB-UPT, 2025.)"""
    return tuple(AttentionPattern(branch.tokens, (branch.anchors,)) for branch in branches)


def cross_patterns(branches: Sequence[AnchorBranch]) -> tuple[AttentionPattern, ...]:
    """Every branch attends to the anchors of all others. (Alkin et al., AB-UPT, 2025.)

    Raises:

    - `ValueError` if there is only one branch.
    """
    if len(branches) < 2:
        raise ValueError(
            f"cross_patterns: there are {len(branches)} branches but must be 2 or more, since "
            "each attends to the others."
        )
    anchors = [branch.anchors for branch in branches]
    return tuple(
        AttentionPattern(branch.tokens, tuple(a for a in anchors if a != branch.anchors))
        for branch in branches
    )


def joint_patterns(branches: Sequence[AnchorBranch]) -> tuple[AttentionPattern, ...]:
    """All branches attend to the anchors of all."""
    tokens = tuple(name for branch in branches for name in branch.tokens)
    return (AttentionPattern(tokens, tuple(branch.anchors for branch in branches)),)


def group_mask(tokens: Sequence[TokenSpec], patterns: Sequence[AttentionPattern]) -> TokenGroups:
    """The mask equivalent to `patterns`, for an input that has every group.

    Raises:

    - `ValueError` if groups and patterns do not fit together; see `MixedAttention`.
    """
    check_patterns("group_mask", patterns)
    absent = [spec.name for spec in tokens if spec.size is None]
    if absent:
        raise ValueError(
            f"group_mask: the groups {absent} have size=None; a mask covers all tokens that are "
            "attended to, so give their sizes."
        )
    check_tokens("group_mask", tokens, patterns, None, ())
    reads = {name: p.key_value_tokens for p in patterns for name in p.query_tokens}
    return TokenGroups(
        [spec.size or 0 for spec in tokens],
        [[other.name in reads[spec.name] for other in tokens] for spec in tokens],
    )


def check_patterns(owner: str, patterns: Sequence[AttentionPattern]) -> None:
    """Checks that no group is a query twice."""
    if not patterns:
        raise ValueError(f"{owner}: there are no patterns, so nothing would be attended to.")
    names = [name for pattern in patterns for name in pattern.query_tokens]
    _check_distinct(owner, "query_tokens of all patterns", names)


def check_tokens(
    owner: str,
    tokens: Sequence[TokenSpec],
    patterns: Sequence[AttentionPattern],
    seq: int | None,
    cached: Sequence[str],
) -> None:
    """Checks groups against patterns, the length of the input, and what is in a cache."""
    names = [spec.name for spec in tokens]
    _check_distinct(owner, "names of tokens", names)
    present = [spec.name for spec in tokens if spec.size is not None]
    total = sum(spec.size for spec in tokens if spec.size is not None)
    if seq is not None and total != seq:
        sizes = ", ".join(f"{s.name}={s.size}" for s in tokens if s.size is not None)
        raise ValueError(
            f"{owner}: the sizes of the groups ({sizes}) add up to {total}, but the input has "
            f"{seq} tokens."
        )
    queried = {name for pattern in patterns for name in pattern.query_tokens}
    for name in present:
        if name not in queried:
            raise ValueError(
                f"{owner}: no pattern has {name!r} among its query_tokens; patterns have "
                f"{sorted(queried)}."
            )
        if name in cached:
            raise ValueError(
                f"{owner}: {name!r} is in the input and in the cache; give it size=None to use "
                "the cached keys and values, or begin with an empty cache."
            )
    for pattern in patterns:
        if not set(pattern.query_tokens) & set(present):
            continue
        for name in pattern.key_value_tokens:
            if name not in names:
                raise ValueError(
                    f"{owner}: {tuple(pattern.query_tokens)} attend to {name!r}, which is not one "
                    f"of the groups {names}; with size=None it is taken from the cache."
                )
            if name not in present and name not in cached:
                raise ValueError(
                    f"{owner}: {name!r} has size=None, so its keys and values come from a cache, "
                    f"which has {sorted(cached)}."
                )


def _check_distinct(owner: str, what: str, names: Sequence[str]) -> None:
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{owner}: {what} have {twice[0]!r} more than once.")
