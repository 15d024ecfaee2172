"""Where an adapter lives: which weights share one network, and how they become the network's modes. Integers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from superlora_tn.declare.parts import SpecError, check_count, check_flag

Shape = tuple[int, int]
ROLES = {"out": "out", "head": "out", "in": "in", "layer": "member", "type": "member", "member": "member"}


@dataclass(frozen=True)
class Mode:
    """One axis of the network's tensor: its name, its size, and what it is (`out`, `in`, `member` or `flat`)."""

    name: str
    size: int
    role: str


@dataclass(frozen=True)
class PhysicalGroup:
    """Weights of one shape that share a network with physical modes.

    Attributes:
        modes: the modes, in the fold's order.
        shape: (out, in) of each member.
        members: target name -> the positions of its member modes, in their order.
    """

    modes: tuple[Mode, ...]
    shape: Shape
    members: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlatGroup:
    """All weights as one vector of `total` elements, cut into `groups` runs as even as can be.

    The first ``total % groups`` runs hold one element more than the others, so every element is in exactly one.

    Attributes:
        modes: the M modes of one group's tensor; its first `inner` elements feed the projection.
        length: elements of the longest group, ceil(total / groups).
        inner: elements a group's network has to give, ceil(ratio * total / groups).
        members: target name -> (offset in the vector, out, in).
    """

    modes: tuple[Mode, ...]
    groups: int
    total: int
    length: int
    inner: int
    members: Mapping[str, tuple[int, int, int]]

    def start(self, group: int) -> int:
        """Where `group` starts in the vector; ``start(groups)`` is `total`."""
        return group * (self.total // self.groups) + min(group, self.total % self.groups)

    @property
    def surplus(self) -> int:
        """Elements of one group's tensor that are cut off."""
        return math.prod(m.size for m in self.modes) - self.inner


def split_name(name: str) -> tuple[str, str]:
    """Split a module's name into (layer, type): the layer ends with the last number before the last component.

    ``"encoder.layer.3.attention.q_proj"`` gives ``("encoder.layer.3", "attention.q_proj")``.
    """
    words = name.split(".")
    numbers = [i for i, word in enumerate(words[:-1]) if word.isdigit()]
    cut = numbers[-1] + 1 if numbers else 0
    return ".".join(words[:cut]), ".".join(words[cut:])


def factorise(size: int, count: int, factor: int = -1) -> tuple[int, ...]:
    """Split `size` into `count` factors, ascending: each the largest divisor not above the even share of what is left.

    With `count == 2` and `factor > 0` the first is `factor` where that divides, else the largest divisor below it
    (PEFT's `factorization`).

    >>> factorise(768, 2), factorise(250, 2), factorise(768, 3), factorise(1024, 2, factor=4)
    ((24, 32), (10, 25), (8, 8, 12), (4, 256))
    """
    if count == 1:
        return (size,)
    if factor > 0 and size % factor == 0:
        return (factor, size // factor)
    limit = _root(size, count)
    first = next(d for d in range(min(limit, factor) if factor > 0 else limit, 0, -1) if size % d == 0)
    rest = (first, *factorise(size // first, count - 1))
    return tuple(sorted(rest)) if count > 2 else rest


def _root(size: int, order: int) -> int:
    """The largest whole number whose `order`-th power is at most `size`."""
    guess: int = round(size ** (1 / order))
    while guess**order > size:
        guess -= 1
    while (guess + 1) ** order <= size:
        guess += 1
    return guess


def equal_side(length: int, order: int) -> int:
    """The smallest side d with ``d**order >= length``, computed in whole numbers."""
    root = _root(length, order)
    return root if root**order == length else root + 1


@dataclass(frozen=True)
class PhysicalFold:
    """Modes as the model has them: out, in, and any of layer, type, head (or `member`, one number a weight).

    Weights of equal shape stack. Without a `type` mode each type (the name behind the last layer number) is a
    group of its own; without any member mode each weight is.

    Args:
        modes: mode names separated by spaces, in the network's order.
        heads: how many heads `out` is split into; needed exactly with a `head` mode.
    """

    modes: str = "out in"
    heads: int | None = None

    def __post_init__(self) -> None:
        names = self.modes.split() if isinstance(self.modes, str) else []
        for name in names:
            if name not in ROLES:
                raise SpecError(f"PhysicalFold was given the mode '{name}'; modes are {', '.join(ROLES)}.")
            if names.count(name) > 1:
                raise SpecError(f"PhysicalFold '{self.modes}' names the mode '{name}' twice; name it once.")
        if "out" not in names or "in" not in names:
            raise SpecError(f"PhysicalFold was given {self.modes!r}; both 'out' and 'in' must be among the modes.")
        if "member" in names and ("layer" in names or "type" in names):
            raise SpecError("PhysicalFold has 'member' beside 'layer' or 'type'; 'member' already numbers every weight.")
        if ("head" in names) != (self.heads is not None):
            raise SpecError("PhysicalFold needs heads=... exactly when 'head' is one of its modes.")
        if self.heads is not None:
            check_count("PhysicalFold", "heads", self.heads, 1 << 20)
        if "head" in names and names.index("head") > names.index("out"):
            raise SpecError(f"PhysicalFold '{self.modes}' has 'out' before 'head'; out = head x rest, so write 'head out'.")

    def lay_out(self, shapes: Mapping[str, Shape], ratio: float = 1.0) -> tuple[PhysicalGroup, ...]:
        """Sort targets (name -> (out, in)) into groups and give each group its modes."""
        names = self.modes.split()
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, shape in shapes.items():
            layer, kind = split_name(name)
            if "member" in names or "type" in names:
                own: tuple[str, ...] = () if "layer" in names or "member" in names else (layer,)
            else:
                own = (kind,) if "layer" in names else (name,)
            groups.setdefault((shape, *own), []).append(name)
        return tuple(self._group(shapes[members[0]], members) for members in groups.values())

    def _group(self, shape: Shape, targets: list[str]) -> PhysicalGroup:
        names = self.modes.split()
        parts = {t: split_name(t) for t in targets}
        values = {
            "layer": list(dict.fromkeys(p[0] for p in parts.values())),
            "type": list(dict.fromkeys(p[1] for p in parts.values())),
            "member": targets,
        }
        words = {t: {"layer": parts[t][0], "type": parts[t][1], "member": t} for t in targets}
        member_modes = [n for n in names if ROLES[n] == "member"]
        cells = math.prod(len(values[n]) for n in member_modes)
        if member_modes and cells != len(targets):
            raise SpecError(
                f"PhysicalFold '{self.modes}' needs every type in every layer, but {len(targets)} targets of shape "
                f"{shape} fill {len(values['layer'])} layers x {len(values['type'])} types ({cells} cells). "
                "Use the mode 'member' in place of 'layer' and 'type', or other targets."
            )
        if self.heads and shape[0] % self.heads:
            raise SpecError(
                f"out={shape[0]} of '{targets[0]}' does not split into heads={self.heads}; {self.heads} must divide it."
            )
        sizes = {"out": shape[0] // (self.heads or 1), "in": shape[1], "head": self.heads or 1}
        sizes |= {n: len(values[n]) for n in member_modes}
        modes = tuple(Mode(n, sizes[n], ROLES[n]) for n in names)
        members = {t: tuple(values[n].index(words[t][n]) for n in member_modes) for t in targets}
        return PhysicalGroup(modes, shape, members)


@dataclass(frozen=True)
class FlatFold:
    """The paper's fold: vectorise all targets one after another, cut the vector into groups, fold each to M modes.

    A group's tensor has equal sides, ``d = ceil(n ** (1 / M))``, and the surplus ``d**M - n`` is cut off
    (with Kronecker splits K, ``d = e**K`` with ``e = ceil(n ** (1 / (M K)))``, so that each split gets e).

    Args:
        order: M, the number of modes.
        groups: G, how many groups; where G does not divide N, the first N mod G groups hold one element more.
            ``"weight"`` makes every weight a group of its own.
        splits: K, into how many Kronecker factors each side must split; None takes the number of parts of the network's
            outermost Kronecker (`AdapterSpec` fills it in).
        stacked: for order 2, stack to the width of the widest weight (its in): sides (width, ceil(n / width)), the
            paper's "2D".
        multiple: sides are rounded up to a multiple of it; the paper's unprojected "2D reshape" rounds to the layers' width
            (inferred from its counts).
    """

    order: int = 3
    groups: int | str = 1
    splits: int | None = None
    stacked: bool = False
    multiple: int = 1

    def __post_init__(self) -> None:
        check_count("FlatFold", "order", self.order, 32)
        check_count("FlatFold", "multiple", self.multiple, 1 << 20)
        if self.splits is not None:
            check_count("FlatFold", "splits", self.splits, 32)
        check_flag("FlatFold", "stacked", self.stacked)
        good = self.groups == "weight" or (isinstance(self.groups, int) and not isinstance(self.groups, bool))
        if not good or (isinstance(self.groups, int) and self.groups < 1):
            raise SpecError(f"FlatFold was given groups={self.groups!r}; give a number of at least 1, or 'weight'.")
        if self.stacked and (self.order != 2 or self.splits not in (None, 1)):
            raise SpecError(
                f"FlatFold(stacked=True) is two-dimensional; it was given order={self.order}, splits={self.splits}."
            )
        if self.multiple > 1 and (self.stacked or self.splits not in (None, 1)):
            raise SpecError(
                f"FlatFold was given multiple={self.multiple} with stacked={self.stacked}, splits={self.splits}; "
                "it rounds equal sides that are not split. Leave multiple=1."
            )

    def lay_out(self, shapes: Mapping[str, Shape], ratio: float = 1.0) -> tuple[FlatGroup, ...]:
        """Concatenate targets (name -> (out, in)) in order; `ratio` is the projection's rho."""
        if self.groups == "weight":
            return tuple(self._group({name: shape}, 1, ratio) for name, shape in shapes.items())
        return (self._group(shapes, int(self.groups), ratio),)

    def _group(self, shapes: Mapping[str, Shape], groups: int, ratio: float) -> FlatGroup:
        offset, members = 0, {}
        for name, (d_out, d_in) in shapes.items():
            members[name] = (offset, d_out, d_in)
            offset += d_out * d_in
        if groups > offset:
            raise SpecError(f"FlatFold was given groups={groups} for {offset} elements; choose at most {offset} groups.")
        length = -(-offset // groups)
        # In fractions: a float product such as 0.07 * 100 lands above the whole number and would count one more.
        inner = math.ceil(Fraction(str(ratio)) * offset / groups)
        sides = self._sides(inner, max(d_in for _, d_in in shapes.values()))
        modes = tuple(Mode(f"m{k + 1}", side, "flat") for k, side in enumerate(sides))
        return FlatGroup(modes, groups, offset, length, inner, members)

    def _sides(self, inner: int, width: int) -> tuple[int, ...]:
        if self.stacked:
            return (width, -(-inner // width))
        splits = self.splits or 1
        side = equal_side(inner, self.order * splits) ** splits
        return (-(-side // self.multiple) * self.multiple,) * self.order


Fold = PhysicalFold | FlatFold
Group = PhysicalGroup | FlatGroup
