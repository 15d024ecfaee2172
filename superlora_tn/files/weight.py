"""One weight's adapter as a file holds it: a network whose sizes are the file's own, and the exact factor of dW."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from superlora_tn.declare.fold import PhysicalFold, Shape
from superlora_tn.declare.joins import Magnitude
from superlora_tn.declare.parts import Network, Node, parse_modes
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.forms import ASIDE, FORMS
from superlora_tn.network.spec import AdapterSpec

SHARED = PhysicalFold("member out in")
# The node that holds the base's weight.
BASE = "base"
# The largest size of a bond or of a part of a split mode that a network takes.
MAX_RANK = 1 << 20


@dataclass(frozen=True, eq=False)
class Weight:
    """The adapter of one weight, without a model.

    Attributes:
        name: as in the file.
        kind: the method, see `forms`.
        modes: of dW, in the notation of `Network`.
        nodes: name -> (its indices, its tensor).
        scale: dW is the network times this.
        ranks: sizes of the bonds that alpha is divided by, or would be.
        kernel: the sizes of a convolution's kernel, () where the file does not say that there is one.
        frozen: names of nodes that are not trained.
        shared: names of nodes that are one tensor for all weights of a size (VeRA's).
        magnitude: DoRA's norms, (out, 1) or (1, in).
        times_base: whether dW is this times the base's weight, number by number (HiRA).
        joins: whether DoRA's norms of rows are part of the declaration, so that they train on; else dW is what they make of it.
        flipped: whether a model may hold the weight the other way round: an embedding's table is (in, out).
        turned: whether it is held so.
        late: makes the whole weight once a model says its (out, in), which the file does not; until then a size that is not
            known counts as 0. Takes this, the shape, and what `Parsed.projections` drew.
    """

    name: str
    kind: str
    modes: str
    nodes: Mapping[str, tuple[str, Tensor]]
    scale: float = 1.0
    ranks: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    frozen: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    magnitude: Tensor | None = None
    times_base: bool = False
    joins: bool = False
    flipped: bool = False
    turned: bool = False
    late: Callable[[Weight, Shape, Mapping[str, Tensor]], Weight] | None = None
    sizes: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", self._sizes())

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for field_, (indices, tensor) in self.nodes.items():
            names = indices.split()
            if len(names) != tensor.ndim:
                raise CheckpointError(f"'{self.name}': {field_} of shape {tuple(tensor.shape)} has the axes '{indices}'.")
            for index, size in zip(names, tensor.shape, strict=True):
                if sizes.setdefault(index, size) != size:
                    given = ", ".join(f"{n} {tuple(t.shape)}" for n, (_, t) in self.nodes.items())
                    raise CheckpointError(
                        f"'{self.name}': its tensors do not fit together, {size} is not {sizes[index]} ({given}); "
                        "the file is damaged, or of a method that is not known."
                    )
        return sizes

    @property
    def shape(self) -> Shape:
        """(out, in) of dW; a kernel's axes belong to in."""
        out, inward = (math.prod(self.sizes.get(i, 0) for i in group) for group in parse_modes(self.modes))
        return out, inward

    @property
    def size(self) -> int:
        """Numbers that the file holds for it."""
        return sum(t.numel() for name, (_, t) in self.nodes.items() if name not in self.shared)

    @property
    def spec(self) -> AdapterSpec:
        """Its declaration: all sizes but those of whole modes are stated, so that nothing is recomputed."""
        groups = parse_modes(self.modes)
        whole = {group[0] for group in groups if len(group) == 1}
        sizes = {i: s for i, s in self.sizes.items() if i not in whole}
        member = "m " if self.shared else ""
        nodes = {
            name: Node(
                indices if not member or name in self.shared else f"m {indices}",
                "base" if name == BASE else "auto",
                trainable=name not in self.frozen,
            )
            for name, (indices, _) in self.nodes.items()
        }
        network = Network(member + self.modes, sizes, **nodes)
        # A network in index notation counts as rank 1, so alpha is the factor itself.
        alpha = None if self.scale == 1.0 else self.scale
        join = Magnitude() if self.joins else None
        return AdapterSpec(network, SHARED if self.shared else PhysicalFold(), alpha=alpha, join=join)

    def tensors(self) -> dict[str, Tensor]:
        """The nodes' values by name."""
        return {name: tensor for name, (_, tensor) in self.nodes.items()}

    def dense(self) -> Tensor:
        """dW in float64, (out, in), without DoRA's norms."""
        letters: dict[str, int] = {}
        operands: list[Tensor | list[int]] = []
        for indices, tensor in self.nodes.values():
            operands += [tensor.double(), [letters.setdefault(i, len(letters)) for i in indices.split()]]
        result = [letters[i] for group in parse_modes(self.modes) for i in group]
        return torch.einsum(*operands, result).reshape(self.shape) * self.scale

    @property
    def rests(self) -> bool:
        """Whether dW follows from the base's weight."""
        return (self.magnitude is not None and not self.joins) or self.times_base

    def joined(self) -> Weight:
        """The same with its norms in the declaration, where they are of rows; an embedding's, and those of columns, are not."""
        rows = self.magnitude is not None and self.magnitude.shape == (self.shape[0], 1)
        return replace(self, joins=rows and not self.flipped and self.late is None)

    def with_base(self, base: Tensor) -> Weight:
        """A weight that rests on the base's, W (out, in), as it is on this one.

        HiRA's W is a frozen node of the network.
        """
        if not self.times_base:
            return self.with_norms(base)
        names = [index for group in parse_modes(self.modes) for index in group]
        dtype = next(iter(self.nodes.values()))[1].dtype
        own = base.detach().to(device="cpu", dtype=dtype).reshape([self.sizes[i] for i in names])
        nodes = {**self.nodes, BASE: (" ".join(names), own)}
        return replace(self, kind="hira", nodes=nodes, frozen=self.frozen | {BASE}, times_base=False)

    def with_norms(self, base: Tensor) -> Weight:
        """DoRA's dW for a base weight W, as one dense node: ``m (W + dW) / ||W + dW|| - W`` (Liu et al. 2024).

        Args:
            base: W, (out, in).
        """
        assert self.magnitude is not None
        moved = base.detach().double() + self.dense()
        wanted = self.magnitude.double()
        if wanted.shape[0] == 1:
            # Norms of columns; of a convolution, of all of a channel's.
            blocks = moved.reshape(moved.shape[0], wanted.shape[1], -1)
            norms, wanted = torch.linalg.vector_norm(blocks, dim=(0, 2), keepdim=True), wanted[:, :, None]
        else:
            blocks = moved
            norms = torch.linalg.vector_norm(blocks, dim=1, keepdim=True)
        turned = torch.where(norms > 0, blocks * (wanted / norms), 0.0).reshape(moved.shape)
        delta = (turned - base.detach().double()).to(torch.promote_types(base.dtype, torch.float32))
        fresh: frozenset[str] = frozenset()
        return replace(
            self,
            kind="full",
            modes="o i",
            nodes={"diff": ("o i", delta)},
            scale=1.0,
            ranks=(),
            magnitude=None,
            frozen=fresh,
            shared=fresh,
        )


def norms_of(field_: str, tensor: Tensor, weight: Weight) -> Tensor:
    """DoRA's norms as a file has them, as (out, 1) or (1, in); in counts a convolution's channels, not its kernel.

    Raises:
        CheckpointError: as many norms as neither rows nor columns.
    """
    out, inward = weight.shape
    count = tensor.numel()
    # PEFT lays them along one axis, an embedding's one a number of its rows, as dim is out. LyCORIS' axes show the side.
    rows = field_ == "magnitude" or (tensor.shape[:1] == (count,) and count == out)
    if count == 0 or (count != out if rows else inward % count):
        raise CheckpointError(
            f"'{weight.name}' has {count} norms (DoRA, shape {tuple(tensor.shape)}): neither one for each of its {out} rows, "
            f"nor of its {inward} columns."
        )
    return tensor.reshape(-1, 1) if rows else tensor.reshape(1, -1)


def build(name: str, fields: Mapping[str, Tensor]) -> Weight:
    """The network that the tensors of one weight are, by the names of their fields.

    Args:
        name: the weight's.
        fields: what `forms.split_key` calls them -> tensors.

    Returns:
        the weight, its scale still 1.

    Raises:
        CheckpointError: no method has exactly these tensors, or their sizes do not fit together.
    """
    own = {f: t for f, t in fields.items() if f not in ASIDE}
    form = next((form for form in FORMS if set(form.nodes) == set(own)), None)
    if form is None:
        raise CheckpointError(f"'{name}' has the tensors {', '.join(sorted(own))}; {_nearest(set(own))}.")
    for field_, tensor in own.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"'{name}': {field_} is of {tensor.dtype}; an adapter's tensors are of real numbers.")
        if not tensor.numel():
            raise CheckpointError(f"'{name}': {field_} has the shape {tuple(tensor.shape)} and holds nothing.")
    kernels, nodes = set[tuple[int, ...]](), {}
    for field_, indices in form.nodes.items():
        written, tensor, kernel = _fit(name, field_, indices, own[field_])
        nodes[field_.removeprefix("embedding_")] = (written, tensor)
        # Beside a kernel of its own (`k`), the other tensors of a convolution are 1x1.
        if kernel and not (" k" in form.modes and set(kernel) == {1}):
            kernels.add(kernel)
    if len(kernels) > 1:
        kernels = {k for k in kernels if set(k) != {1}}
    if len(kernels) > 1:
        raise CheckpointError(f"'{name}': its tensors have kernels of the sizes {' and '.join(map(str, kernels))}.")
    kernel = kernels.pop() if kernels else ()
    modes = form.modes.replace("k", " ".join(_axes(kernel))).replace(" )", ")") if " k" in form.modes else form.modes
    weight = Weight(name, form.kind, modes, nodes, kernel=kernel, frozen=form.frozen, flipped=form.flipped)
    whole = {group[0] for group in parse_modes(modes) if len(group) == 1}
    if large := [size for index, size in weight.sizes.items() if index not in whole and size > MAX_RANK]:
        raise CheckpointError(f"'{name}' has an axis of {large[0]:,} within its network; at most {MAX_RANK:,} are taken.")
    return replace(weight, ranks=tuple(weight.sizes[i] for i in form.rank if i in weight.sizes))


def _axes(kernel: tuple[int, ...]) -> list[str]:
    return [f"k{j + 1}" for j in range(len(kernel))]


def _fit(name: str, field_: str, indices: str, tensor: Tensor) -> tuple[str, Tensor, tuple[int, ...]]:
    """A tensor with as many axes as indices, and the kernel's sizes where it has them."""
    words = indices.split()
    if words[-1] == "k":
        kernel = tuple(tensor.shape[len(words) - 1 :])
        return " ".join([*words[:-1], *_axes(kernel)]), tensor, kernel
    extra = tuple(tensor.shape[len(words) :])
    if tensor.ndim >= len(words) and words[-1].startswith("i"):
        return indices, tensor.flatten(len(words) - 1) if extra else tensor, extra
    if tensor.ndim < len(words) or any(size != 1 for size in extra):
        raise CheckpointError(f"'{name}': {field_} has the shape {tuple(tensor.shape)}, expected the axes '{indices}'.")
    return indices, tensor.reshape(tensor.shape[: len(words)]), ()


def _nearest(found: set[str]) -> str:
    """What the form with the most of these tensors still lacks, in words."""
    best = min(FORMS, key=lambda form: (len(found ^ set(form.nodes)), form.kind))
    lacks, more = set(best.nodes) - found, found - set(best.nodes)
    words = [f"lacks {', '.join(sorted(lacks))}"] * bool(lacks) + [f"has no {', '.join(sorted(more))}"] * bool(more)
    return f"as {best.kind} it {' and '.join(words)}; the file is cut short, or of a method that is not known"
