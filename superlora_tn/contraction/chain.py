"""A convolution's dW as a chain of thin layers: channels, kernel, channels, where the network holds the kernel apart.

``dW[(o1 o2) (i1 i2) k] = left[o1 i1] W[o2 i2 k]`` with ``W = after core before``: x meets `before` position by position, the
core as a small kernel, `after` and `left` position by position again. LoKr's left is w1, and of a Tucker the core is the core;
of a CP it has one kernel for each of its terms (a depthwise convolution). Nothing of dW's size is built.

The kernel is where the modes, or the digits of `in`, say so; else it lies in the last digit of `in`, behind some channels, as
in LoKr's files, and the nodes with that digit are the core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from superlora_tn.contraction.cut import Half
from superlora_tn.contraction.layout import Indices, volume
from superlora_tn.contraction.plan import plan_equation, sub_network
from superlora_tn.contraction.profile import Device
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.bounds import KEPT_NODES
from superlora_tn.declare.cache import kept
from superlora_tn.declare.fold import KERNEL
from superlora_tn.network.graph import Graph


@dataclass(frozen=True)
class Chain:
    """The parts of a chain, first to last; each but the core may be absent, which is the identity.

    Attributes:
        before: (bond, i2), position by position.
        core: (bond or o2, bond / terms or i2, kernel), in `terms` groups; its last two axes may be one.
        after: (o2, bond).
        left: (o1, i1).
        terms: how many groups of the core's channels do not mix.
        sizes: o1, i1, o2, i2.
        widths: channels that the core takes and gives.
        kernel: positions of the kernel.
    """

    before: Half | None
    core: Half
    after: Half | None
    left: Half | None
    terms: int
    sizes: tuple[int, int, int, int]
    widths: tuple[int, int]
    kernel: int

    @property
    def links(self) -> tuple[Half | None, Half, Half | None, Half | None]:
        """All four, first to last."""
        return self.before, self.core, self.after, self.left

    @property
    def parts(self) -> tuple[Half, ...]:
        """Those that are there, in order."""
        return tuple(half for half in self.links if half is not None)

    def fits(self, blocks: int) -> bool:
        """Whether it works for a layer whose channels are in so many blocks that do not mix."""
        return blocks == 1 or (self.after is not None if self.left is None else self.sizes[0] % blocks == 0)

    def pays(self, shape: tuple[int, int], rows: int, before: int, blocks: int = 1) -> bool:
        """Whether it costs less than building dW (out, in) and one product by it; see `cost` and `Halves.pays`."""
        return 2 * self.cost(rows, before, blocks) < shape[0] * shape[1] * (rows + min(self.widths))

    def cost(self, rows: int, before: int, blocks: int = 1) -> int:
        """Multiplications and additions of one call, half of the FLOPs.

        Args:
            rows: positions of the output.
            before: positions of the input.
            blocks: groups of the layer's channels.
        """
        o1, i1, o2, i2 = self.sizes
        taken, given = self.widths
        lanes = blocks * i1
        work = lanes * rows * taken * given // self.terms * self.kernel
        work += lanes * before * i2 * taken if self.before is not None else 0
        # Behind blocks, each makes its own rows of the output alone: of `left` where there is one, else of `after`.
        own = blocks if self.left is None else 1
        work += lanes * rows * given * o2 // own if self.after is not None else 0
        return work + (rows * o1 * i1 * o2 if self.left is not None else 0)


@kept(4096, KEPT_NODES, lambda _, graph, *__, **___: len(graph.nodes))
def chain(graph: Graph, kernel: int, device: Device, optimize: Optimizer) -> Chain | None:
    """The chain of one member of a physical fold; None where the network has no such form.

    Args:
        graph: the network.
        kernel: positions of the kernel, the fastest part of `in`.
    """
    positions, mixed = _positions(graph, kernel)
    indices = [set(graph.indices_of(node, fixed=True)) for node in graph.nodes]
    inner = _connected(indices, set(positions + mixed))
    if not inner:
        return None
    rest = [k for k in range(len(indices)) if k not in inner]
    out, channels = graph.open("out"), tuple(i for i in graph.open("in") if i not in positions)
    held = set[str]().union(*(indices[k] for k in inner))
    o1, o2 = _apart(out, held)
    i1, i2 = _apart(channels, held)
    if o1 + o2 != out or i1 + i2 != channels or not set(o2 + i2 + positions) <= held or (not rest and o1 + i1):
        return None
    found = _cut(indices, inner, o2, i2, positions + mixed)
    # Without others beside it, a core with the channels in it is no more than the inner one of two halves.
    if found is None or not (rest or (found[0][0] or found[0][2] if positions else False)):
        return None
    sides, terms, taken, given = found
    size, inside = graph.size, kernel if mixed else 1

    def half(nodes: Sequence[int], *result: Indices) -> Half:
        equation = sub_network(graph, [graph.nodes[k] for k in nodes], result)
        return Half(tuple(nodes), plan_equation(equation, "delta", device, optimize))

    before, core, after = sides
    return Chain(
        half(before, terms + taken, i2) if before else None,
        half(core, terms + given, taken, *((positions,) if positions else ())),
        half(after, o2, terms + given) if after else None,
        half(rest, o1, i1) if rest else None,
        volume(terms, size),
        (volume(o1, size), volume(i1, size), volume(o2, size), volume(i2, size) // inside),
        (volume(terms + taken, size) // inside, volume(terms + given, size)),
        kernel,
    )


def _positions(graph: Graph, kernel: int) -> tuple[Indices, Indices]:
    """The indices of a kernel; or the last one of `in`, where it holds channels and kernel; both empty where neither is so."""
    named = tuple(i for mode, own in graph.modes if mode.name in KERNEL for i in own)
    if named or kernel == 1:
        return named, ()
    inward = graph.open("in")
    for k in range(1, len(inward) + 1):
        if volume(inward[-k:], graph.size) == kernel:
            return inward[-k:], ()
    return ((), inward[-1:]) if inward and graph.size[inward[-1]] % kernel == 0 else ((), ())


def _connected(indices: Sequence[set[str]], start: set[str]) -> list[int]:
    """Numbers of the nodes that hang together with these indices, if there are any."""
    found, touched = set[int](), set(start)
    while True:
        more = {k for k, own in enumerate(indices) if k not in found and own & touched}
        if not more:
            return sorted(found)
        found |= more
        touched = touched.union(*(indices[k] for k in more))


def _apart(mode: Indices, held: set[str]) -> tuple[Indices, Indices]:
    """A mode's indices that the component lacks, and those that it has."""
    return tuple(i for i in mode if i not in held), tuple(i for i in mode if i in held)


def _cut(
    indices: Sequence[set[str]], inner: Sequence[int], o2: Indices, i2: Indices, positions: Indices
) -> tuple[tuple[list[int], list[int], list[int]], Indices, Indices, Indices] | None:
    """The component's nodes before, in and behind the core; the core's terms, and what else it takes and gives."""
    out, kernel = set(o2), set(positions)
    channels = set(i2) - kernel
    before = [k for k in inner if indices[k] & channels and not indices[k] & (out | kernel)]
    after = [k for k in inner if indices[k] & out and not indices[k] & (channels | kernel)]
    core = [k for k in inner if k not in before and k not in after]
    held = set[str]().union(*(indices[k] for k in core))
    # One side may be the core's own; then no other node has its indices.
    if (before and held & channels) or (after and held & out):
        return None
    bonds = [_shared(indices, side, inner) for side in (before, after)]
    ordered = tuple(dict.fromkeys(i for k in core for i in sorted(indices[k])))
    if not (bonds[0] | bonds[1]) <= held:
        return None
    terms = tuple(i for i in ordered if i in bonds[0] and i in bonds[1])
    taken = tuple(i for i in ordered if i in bonds[0] and i not in terms) if before else i2
    given = tuple(i for i in ordered if i in bonds[1] and i not in terms) if after else o2
    return (before, core, after), terms, taken, given


def _shared(indices: Sequence[set[str]], side: Sequence[int], inner: Sequence[int]) -> set[str]:
    """The indices that some nodes share with the component's others."""
    own, others = (set[str]().union(*(indices[k] for k in inner if (k in side) is inside)) for inside in (True, False))
    return own & others
