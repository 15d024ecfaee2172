"""Where an adapter lives: which weights share one network, and how they become the network's modes. Integers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

from superlora_tn.declare.bounds import MAX_ORDER, PADDED_SPARE, PADDED_TIMES
from superlora_tn.declare.divisors import largest_divisor, root
from superlora_tn.declare.parts import SpecError, check_count, check_flag, shown

Shape = tuple[int, int]
ROLES = dict.fromkeys(("out", "head"), "out") | dict.fromkeys(("in", "kernel", "kd", "kh", "kw"), "in")
ROLES |= dict.fromkeys(("layer", "type", "expert", "member"), "member")
KERNEL = ("kernel", "kd", "kh", "kw")


@dataclass(frozen=True)
class Mode:
    """One axis of the network's tensor.

    Attributes:
        name, size: as the declaration calls it, and how many positions it has.
        role: what it is: `out`, `in`, `member` or `flat`.
        whole: so many of its fastest positions (a kernel) a Kronecker product leaves together.
    """

    name: str
    size: int
    role: str
    whole: int = 1


@dataclass(frozen=True)
class PhysicalGroup:
    """Weights of one shape that share a network with physical modes.

    Attributes:
        modes: the modes, in the fold's order.
        shape: (out, in) of each member.
        members: target name -> the positions of its member modes, in their order.
        rows: target name -> how many rows its weight has, where that is not `shape`'s (a network that multiplies).
    """

    modes: tuple[Mode, ...]
    shape: Shape
    members: Mapping[str, tuple[int, ...]]
    rows: Mapping[str, int] = field(default_factory=dict)

    def rows_of(self, name: str) -> int:
        """How many rows (outputs) a member's weight has."""
        return self.rows.get(name, self.shape[0])


@dataclass(frozen=True)
class FlatGroup:
    """All weights as one vector of `total` elements, cut into `groups` runs as even as can be.

    The first ``total % groups`` runs hold one element more than the others, so every element is in exactly one.

    Attributes:
        modes: the M modes of one group's tensor; its first `inner` elements feed the projection.
        length: elements of the longest group, ceil(total / groups).
        inner: elements a group's network has to give, ceil(ratio * total / groups).
        members: target name -> (offset in the vector, out, in).
        rows: target name -> how many rows its weight has, where that is not `out` (a network that multiplies).
    """

    modes: tuple[Mode, ...]
    groups: int
    total: int
    length: int
    inner: int
    members: Mapping[str, tuple[int, int, int]]
    rows: Mapping[str, int] = field(default_factory=dict)

    def rows_of(self, name: str) -> int:
        """How many rows (outputs) a member's weight has."""
        return self.rows.get(name, self.members[name][1])

    def start(self, group: int) -> int:
        """Where `group` starts in the vector; ``start(groups)`` is `total`."""
        return group * (self.total // self.groups) + min(group, self.total % self.groups)

    def group_of(self, element: int) -> int:
        """The group that an element of the vector is in."""
        short, longer = divmod(self.total, self.groups)
        ahead = longer * (short + 1)  # elements of the groups that hold one more
        return element // (short + 1) if element < ahead else longer + (element - ahead) // short

    @property
    def volume(self) -> int:
        """Elements of one group's tensor."""
        return math.prod(m.size for m in self.modes)

    @property
    def surplus(self) -> int:
        """Elements of one group's tensor that are cut off."""
        return self.volume - self.inner


def split_name(name: str) -> tuple[str, str]:
    """Split a module's name into (layer, type): the layer ends with the last number before the last component.

    ``"encoder.layer.3.attention.q_proj"`` gives ``("encoder.layer.3", "attention.q_proj")``.
    """
    words = name.split(".")
    numbers = [i for i, word in enumerate(words[:-1]) if word.isdigit()]
    cut = numbers[-1] + 1 if numbers else 0
    return ".".join(words[:cut]), ".".join(words[cut:])


def split_expert(name: str) -> tuple[str, str]:
    """Split the number of an expert off a weight's name: the first number behind ``experts``, or a number at the end.

    ``"layers.0.mlp.experts.gate_up_proj.3"`` gives ``("layers.0.mlp.experts.gate_up_proj", "3")``, and
    ``"layers.0.moe.experts.3.w1"`` gives ``("layers.0.moe.experts.w1", "3")``.

    Raises:
        SpecError: there is none.
    """
    words = name.split(".")
    behind = len(words) - words[::-1].index("experts") if "experts" in words else len(words) - 1
    place = next((k for k in range(behind, len(words)) if words[k].isdigit()), None)
    if place is None:
        raise SpecError(
            f"PhysicalFold has the mode 'expert', but '{name:.80}' is no expert's weight; such a name has a number behind "
            "'experts', or at its end."
        )
    return ".".join(words[:place] + words[place + 1 :]), words[place]


@lru_cache(maxsize=4096)
def factorise(size: int, count: int, factor: int = -1) -> tuple[int, ...]:
    """Split `size` into `count` factors, ascending: each the largest divisor not above the even share of what is left.

    With `count == 2` and `factor > 0` the first is `factor` where that divides, else the largest divisor below it
    (PEFT's `factorization`).

    >>> factorise(768, 2), factorise(250, 2), factorise(768, 3), factorise(1024, 2, factor=4)
    ((24, 32), (10, 25), (8, 8, 12), (4, 256))
    """
    if count == 2 and factor > 0:
        first = factor if size % factor == 0 else largest_divisor(size, min(root(size, 2), factor))
        return (first, size // first)
    found, left = list[int](), size
    for shares in range(count, 1, -1):
        found.append(largest_divisor(left, root(left, shares)))
        left //= found[-1]
    found.append(left)
    return tuple(found) if count == 2 else tuple(sorted(found))


def equal_side(length: int, order: int) -> int:
    """The smallest side d with ``d**order >= length``, computed in whole numbers."""
    side = root(length, order)
    return side if side**order == length else side + 1


@dataclass(frozen=True)
class PhysicalFold:
    """Modes as the model has them: out, in, and any of layer, type, expert, head (or `member`, one number a weight).

    Weights of equal shape stack. Without a `type` mode each type (the name behind the last layer number) is a
    group of its own; without any member mode each weight is. With `expert` the experts of a layer share the network, and
    are no part of its layer or type.

    A convolution's kernel is part of `in`, which is then (channels x kernel), or apart from it: in all one mode (`kernel`), or
    one each for depth, height and width (`kd kh kw`). A Kronecker product does not split these, nor the kernel within `in`
    where its sizes are given.

    Args:
        modes: mode names separated by spaces, in the network's order.
        heads: how many heads `out` is split into; needed exactly with a `head` mode.
        kernel: the sizes of the kernel, (height, width) or the like; None lets `attach` take those of each layer, layers of
            one size together, where the kernel has modes or the network has Kronecker products. A matrix has a kernel of ().
    """

    modes: str = "out in"
    heads: int | None = None
    kernel: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        names = self.modes.split() if isinstance(self.modes, str) else []
        for name in names:
            if name not in ROLES:
                raise SpecError(f"PhysicalFold was given the mode '{name:.80}'; modes are {', '.join(ROLES)}.")
            if names.count(name) > 1:
                raise SpecError(f"PhysicalFold '{self.modes:.80}' names the mode '{name}' twice; name it once.")
        if "out" not in names or "in" not in names:
            raise SpecError(f"PhysicalFold was given {shown(self.modes)}; both 'out' and 'in' must be among the modes.")
        if "member" in names and any(other in names for other in ("layer", "type", "expert")):
            raise SpecError(
                "PhysicalFold has 'member' beside 'layer', 'type' or 'expert'; 'member' already numbers every weight."
            )
        if ("head" in names) != (self.heads is not None):
            raise SpecError("PhysicalFold needs heads=... exactly when 'head' is one of its modes.")
        if self.heads is not None:
            check_count("PhysicalFold", "heads", self.heads, 1 << 20)
        if "head" in names and names.index("head") > names.index("out"):
            raise SpecError(f"PhysicalFold '{self.modes}' has 'out' before 'head'; out = head x rest, so write 'head out'.")
        self._check_kernel([n for n in names if n == "in" or n in KERNEL])

    def _check_kernel(self, names: list[str]) -> None:
        """Raise unless the kernel's modes stand in the order of memory, and have sizes where sizes are given."""
        own = names[1:] if names[0] == "in" else []
        if names != ["in", *(["kernel"] if "kernel" in names else [n for n in KERNEL if n in names])]:
            raise SpecError(
                f"PhysicalFold was given the modes '{self.modes}'; a kernel stands behind 'in', as 'in kernel', or as the last "
                "of 'in kd kh kw'."
            )
        if self.kernel is None:
            return
        if not isinstance(self.kernel, tuple) or len(self.kernel) > 3:
            raise SpecError(f"PhysicalFold was given kernel={shown(self.kernel)}; give sizes such as (3, 3), or None.")
        for size in self.kernel:
            check_count("PhysicalFold", "each size of kernel", size, 1 << 20)
        if own and own != ["kernel"] and len(own) < len(self.kernel):
            raise SpecError(
                f"PhysicalFold '{self.modes}' was given kernel={self.kernel}, for which it lacks modes; write 'in kernel', or "
                "one of 'kd kh kw' for each size."
            )

    @property
    def kernel_modes(self) -> tuple[str, ...]:
        """The modes of the kernel."""
        return tuple(n for n in self.modes.split() if n in KERNEL)

    def _kernel_sizes(self, target: str, d_in: int) -> dict[str, int]:
        """The size of `in` and of each mode of the kernel."""
        own = self.kernel_modes
        if own and self.kernel is None:
            raise SpecError(
                f"PhysicalFold '{self.modes}' has modes for a kernel, whose sizes are in no shape (out, in); attach takes them "
                "from the layers, elsewhere give them: kernel=(3, 3)."
            )
        kernel = self.kernel or ()
        cells = math.prod(kernel)
        if d_in % cells:
            raise SpecError(f"in={d_in} of '{target:.80}' does not hold a kernel of {kernel}: {cells} does not divide it.")
        if not own:
            return {"in": d_in}
        sizes = (cells,) if own == ("kernel",) else ((1,) * len(own) + kernel)[len(kernel) :]
        return {"in": d_in // cells, **dict(zip(own, sizes, strict=True))}

    def lay_out(self, shapes: Mapping[str, Shape], ratio: float = 1.0) -> tuple[PhysicalGroup, ...]:
        """Sort targets (name -> (out, in)) into groups and give each group its modes."""
        names = self.modes.split()
        groups: dict[tuple[object, ...], list[str]] = {}
        for name, shape in shapes.items():
            groups.setdefault((shape, *_apart(name, names)), []).append(name)
        return tuple(self._group(shapes[members[0]], members) for members in groups.values())

    def _group(self, shape: Shape, targets: list[str]) -> PhysicalGroup:
        names = self.modes.split()
        member_modes = [n for n in names if ROLES[n] == "member"]
        # What each target is on each member mode, numbered as it first comes.
        words = {n: [_word(n, target, "expert" in names) for target in targets] for n in member_modes}
        places = {n: {word: k for k, word in enumerate(dict.fromkeys(found))} for n, found in words.items()}
        cells = math.prod(map(len, places.values()))
        if member_modes and cells != len(targets):
            sides = " x ".join(f"{len(found)} {n}s" for n, found in places.items())
            raise SpecError(
                f"PhysicalFold '{self.modes}' needs every type in every layer, of every expert, but {len(targets)} targets of "
                f"shape {shape} fill {sides} ({cells} cells). Use the mode 'member' in place of these, or other targets."
            )
        if self.heads and shape[0] % self.heads:
            raise SpecError(
                f"out={shape[0]} of '{targets[0]}' does not split into heads={self.heads}; {self.heads} must divide it."
            )
        sizes = {"out": shape[0] // (self.heads or 1), "head": self.heads or 1, **self._kernel_sizes(targets[0], shape[1])}
        sizes |= {n: len(found) for n, found in places.items()}
        together = 1 if self.kernel_modes else math.prod(self.kernel or ())
        modes = tuple(Mode(n, sizes[n], ROLES[n], together if n == "in" else 1) for n in names)
        members = {t: tuple(places[n][words[n][k]] for n in member_modes) for k, t in enumerate(targets)}
        return PhysicalGroup(modes, shape, members)


def _apart(name: str, modes: Sequence[str]) -> tuple[str, ...]:
    """What keeps a weight from sharing a network with others of its shape: what it is on member modes that the fold lacks."""
    if "member" in modes:
        return ()
    if not any(ROLES[mode] == "member" for mode in modes):
        return (name,)
    rest = split_expert(name)[0] if "expert" in modes else name
    return tuple(word for mode, word in zip(("layer", "type"), split_name(rest), strict=True) if mode not in modes)


def _word(mode: str, target: str, experts: bool) -> str:
    """What a target is on a member mode: its layer, its type, its expert, or itself."""
    if mode == "member":
        return target
    if mode == "expert":
        return split_expert(target)[1]
    return split_name(split_expert(target)[0] if experts else target)[mode == "type"]


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
        check_count("FlatFold", "order", self.order, MAX_ORDER)
        check_count("FlatFold", "multiple", self.multiple, 1 << 20)
        if self.splits is not None:
            check_count("FlatFold", "splits", self.splits, MAX_ORDER)
        check_flag("FlatFold", "stacked", self.stacked)
        good = self.groups == "weight" or (isinstance(self.groups, int) and not isinstance(self.groups, bool))
        if not good or (isinstance(self.groups, int) and self.groups < 1):
            raise SpecError(f"FlatFold was given groups={shown(self.groups)}; give a number of at least 1, or 'weight'.")
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
            groups = tuple(self._group({name: shape}, 1, ratio) for name, shape in shapes.items())
        else:
            groups = (self._group(shapes, int(self.groups), ratio),)
        self._check_padded(groups)
        return groups

    def _check_padded(self, groups: Sequence[FlatGroup]) -> None:
        """Refuse equal sides that hold far more numbers than there are elements."""
        elements = sum(g.total for g in groups)
        padded, most = sum(g.groups * g.volume for g in groups), PADDED_TIMES * (elements + PADDED_SPARE)
        if padded > most:
            side = max(m.size for g in groups for m in g.modes)
            raise SpecError(
                f"FlatFold(order={self.order}, splits={self.splits or 1}, multiple={self.multiple}) makes sides of {side:,}, "
                f"so that its tensors hold {padded:,} numbers for {elements:,} elements of the weights; at most {most:,} are "
                "built. Choose a lower order, fewer splits or groups, or a smaller multiple."
            )

    def _group(self, shapes: Mapping[str, Shape], groups: int, ratio: float) -> FlatGroup:
        offset, members = 0, {}
        for name, (d_out, d_in) in shapes.items():
            members[name] = (offset, d_out, d_in)
            offset += d_out * d_in
        if groups > offset:
            raise SpecError(f"FlatFold was given groups={shown(groups)} for {offset} elements; choose at most {offset} groups.")
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
