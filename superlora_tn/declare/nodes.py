"""One tensor of a network in index notation: its indices, its first values, and what is stored of it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from superlora_tn.declare.bounds import MAX_AXES
from superlora_tn.declare.checks import SpecError, check_flag, shown
from superlora_tn.declare.node_maps import NODE_MAPS, Identity, NodeMap

BASED = ("base", "left", "right", "singular", "columns")
INITS = ("auto", "zeros", "ones", "eye", "normal", "uniform", "orthogonal", "square", *BASED)
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Node:
    """One tensor of a network in index notation.

    Args:
        indices: its index names, separated by spaces, in the order of the tensor's axes, e.g. ``"o r"``.
        init: ``"auto"`` (the library scales it, see `initialise`), ``"zeros"``, ``"ones"``, ``"eye"``,
            ``"normal"``, ``"uniform"``, ``"orthogonal"`` or ``"square"`` (as torch starts a linear layer n x n of as many
            numbers, U(-1/sqrt(n), 1/sqrt(n)): for a gate that mixes some axes of x); of a frozen node also ``"base"``, the
            weight W as it is when the adapter is attached (a copy, saved with it), or from its SVD the first ``"left"`` or
            ``"right"`` singular vectors or ``"singular"`` values, as many as the node's bonds have, or the norms of its
            ``"columns"``, one an input.
        trainable: False freezes the node: it counts no parameter and gets no gradient.
        map: what is stored is another tensor, of which the node is this function, such as `Fourier` or `Cayley`; `init` is
            then that of the stored tensor. None stores the node itself.

    Raises:
        SpecError: an unreadable or repeated index, an unknown init, or a map that does not fit.
    """

    indices: str
    init: str = "auto"
    trainable: bool = True
    map: NodeMap | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.indices, str):
            raise SpecError(f"a node was given indices {shown(self.indices)}; write a string of names such as 'o r'.")
        names = self.index_names
        for name in names:
            if not NAME.fullmatch(name):
                raise SpecError(
                    f"node '{self.indices:.80}' has the index '{name:.80}'; an index is a letter followed by letters, "
                    "digits or '_'. Separate indices by spaces."
                )
        if len(names) > MAX_AXES:
            raise SpecError(f"node '{self.indices:.80}...' has {len(names):,} indices; a tensor has at most {MAX_AXES} axes.")
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise SpecError(
                f"node '{self.indices}' has index '{twice[0]}' twice; a diagonal is not a node. "
                "Give the second axis a name of its own."
            )
        check_flag(f"node '{self.indices}'", "trainable", self.trainable)
        if self.init not in INITS:
            raise SpecError(f"node '{self.indices}' was given init={shown(self.init)}; choose one of {', '.join(INITS)}.")

        if self.init in BASED and self.trainable:
            raise SpecError(f"node '{self.indices}' starts as the base's '{self.init}' and is frozen; say trainable=False.")
        if self.map is not None:
            self._check_map()

    def _check_map(self) -> None:
        if not isinstance(self.map, NODE_MAPS):
            kinds = ", ".join(kind.__name__ for kind in NODE_MAPS)
            raise SpecError(f"node '{self.indices}' was given map={shown(self.map)}; give one of {kinds}, or None.")
        if len(self.index_names) < self.map.axes:
            raise SpecError(
                f"node '{self.indices}' was given map={self.map}, which makes the last {self.map.axes} axes of a node; "
                "give it as many indices."
            )
        if self.init == "zeros" and not self.map.from_zero and self.map.init != "zeros":
            raise SpecError(f"node '{self.indices}' starts {self.map} at zeros, where it may never train; choose another.")
        if isinstance(self.map, Identity) and len(self.index_names) > 2:
            raise SpecError(f"node '{self.indices}' is the identity; give it two indices.")
        if self.trainable and (isinstance(self.map, Identity) or self.map.of is not None):
            raise SpecError(f"node '{self.indices}' with map={self.map} has nothing of its own to train; say trainable=False.")
        if self.init in (*BASED, "eye"):
            raise SpecError(f"node '{self.indices}' has a map, whose stored tensor is not '{self.init}'; choose another init.")

    @property
    def index_names(self) -> tuple[str, ...]:
        """The indices, one name each."""
        return tuple(self.indices.split())


_MODE = re.compile(r"\(([^()]*)\)|([^\s()]+)")


def parse_modes(modes: str) -> tuple[tuple[str, ...], ...]:
    """Read einops-like mode notation: ``"(o1 o2) i"`` gives ``(("o1", "o2"), ("i",))``."""
    if not isinstance(modes, str):
        raise SpecError(f"Network was given modes {shown(modes)}; write a string such as '(o1 o2) i'.")
    left_over = _MODE.sub(" ", modes).strip()
    if left_over:
        raise SpecError(f"Network cannot read the modes '{modes:.80}': stray '{left_over:.80}'. Write '(o1 o2) (i1 i2)'.")
    groups = tuple(tuple((m[2] if m[1] is None else m[1]).split()) for m in _MODE.finditer(modes))
    if not groups or not all(groups):
        raise SpecError(f"Network was given the modes '{modes:.80}', in which a mode is empty; name at least one index.")
    return groups
