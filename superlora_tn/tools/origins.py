"""Where an adapter starts: from the weights, from what flows through them, or from their gradient, in place of zero.

`start(tuned, pissa())` sets the nodes. Where the start has a dW of its own, dW0, the model's output stays what it was, as the
adapter's dW is then the network at its nodes less the network at the start: a network of twice the ranks, of which one half
trains and the other half is the start. The base's weights are not touched, so `detach` and `merge` are exact, quantised bases
work, and what `save` writes is that network of twice the ranks: whoever loads it gets the right dW.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from superlora_tn.declare.checks import checked_seed
from superlora_tn.declare.fold import FlatGroup, Shape
from superlora_tn.declare.parts import SpecError, check_number, shown
from superlora_tn.files.own import Entry, tensor_name
from superlora_tn.model.saved import depart
from superlora_tn.model.targets import AttachError
from superlora_tn.model.tuned import Tuned
from superlora_tn.network.graph import Graph
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.sums import blocks, summed
from superlora_tn.tools.decompose import fit_weights
from superlora_tn.tools.difference import resting
from superlora_tn.tools.fitting import Settings
from superlora_tn.tools.looks import gradients, inputs
from superlora_tn.update.base import Adapter
from superlora_tn.update.based import Read

Pair = tuple[Tensor, Tensor]
Batches = Iterable[Any]
STARTS = ("pissa", "olora", "orthogonal", "eva", "corda", "lora_ga")
DIRECTIONS = ("ArBr", "A2rBr", "ArB2r")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Start(ABC):
    """How an adapter starts: a value without state.

    Attributes:
        departs: whether dW0 is not zero, so that it has to be taken off.
    """

    departs = True

    def look(self, tuned: Tuned) -> Mapping[str, Tensor]:
        """What is to be known of each weight beside itself; it may run the model."""
        return {}

    @abstractmethod
    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        """B (out, rank) and A (rank, in) of a weight (out, in), all float64; dW0 is ``scale B A``."""

    def nearest(self, weight: Tensor) -> Tensor | None:
        """What a network that is no plain B A starts nearest to; None where that is not said."""
        return None


@dataclass(frozen=True)
class _Pissa(Start):
    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        roots = (values[:rank] / abs(scale)).sqrt()
        return left[:, :rank] * roots * math.copysign(1, scale), roots[:, None] * right[:rank]

    def nearest(self, weight: Tensor) -> Tensor | None:
        return weight


def pissa() -> Start:
    """PiSSA: B and A from the largest singular values of W, dW0 its best approximation (Meng et al. 2024, arXiv 2404.02948).

    ``scale B A = U_r S_r V_r^T``, B and A with the roots of S. Networks other than B A start as the one nearest to W that
    `decompose` finds: of LoTR, a Tucker of all weights that share it. Frozen nodes of the base's values (LoRA-XS, SVFT) stay.
    """
    return _Pissa()


@dataclass(frozen=True)
class _Olora(Start):
    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        q, r = torch.linalg.qr(weight)
        return q[:, :rank], r[:rank]


def olora() -> Start:
    """OLoRA: ``B = Q_r, A = R_r`` of ``W = Q R``, so that B is orthonormal (Büyükakyüz 2024, arXiv 2406.01775)."""
    return _Olora()


@dataclass(frozen=True)
class _Orthogonal(Start):
    seed: int
    departs = False

    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        if rank % 2:
            raise SpecError(f"orthogonal() was given a rank of {rank}; half of it is B's and half A's, so choose an even one.")
        # Each shape has its own numbers; weights of one shape start alike, as their updates need not differ at the start.
        generator = torch.Generator().manual_seed(self.seed)
        draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in _sides(weight, rank)]
        turned = torch.linalg.qr(draw[0])[0]
        return draw[1] @ turned[1::2] / 10, (draw[2] @ turned[0::2]).T / 10


def _sides(weight: Tensor, rank: int) -> tuple[tuple[int, int], ...]:
    return (rank, rank), (weight.shape[0], rank // 2), (weight.shape[1], rank // 2)


def orthogonal(seed: int = 0) -> Start:
    """Random B and A in two halves of the bond that are orthogonal, so that B A is zero with neither of them zero (datta0,
    "Rethinking LoRA initialisation", 2024; PEFT's ``"orthogonal"``). dW0 is zero but for rounding.

    Args:
        seed: of the random numbers.
    """
    return _Orthogonal(checked_seed("orthogonal", seed))


@dataclass(frozen=True)
class _Eva(Start):
    batches: Batches
    whiten: bool
    departs = False

    def look(self, tuned: Tuned) -> Mapping[str, Tensor]:
        seen = inputs(tuned, self.batches)
        return {name: square - torch.outer(total, total) / count for name, (count, total, square) in seen.items()}

    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        assert known is not None
        values, vectors = torch.linalg.eigh(known)
        found = vectors.flip(1)[:, :rank].T
        if self.whiten:
            found = found / values.flip(0)[:rank].clamp_min(torch.finfo(torch.float32).tiny).sqrt().sqrt()[:, None]
        return torch.zeros(weight.shape[0], rank, dtype=torch.float64), found


def eva(batches: Batches, whiten: bool = False) -> Start:
    """EVA: A from the principal directions of what flows into each layer, B zero (Paischer et al. 2024, arXiv 2410.07170).

    Centred, as in PEFT. Every weight keeps its rank; the paper's redistribution of ranks over layers is not done.

    Args:
        batches: inputs of the model, each a tensor, a tuple of arguments or a dict of keywords.
        whiten: divide each direction by the root of its singular value.
    """
    return _Eva(_listed("eva", batches), bool(whiten))


@dataclass(frozen=True)
class _Corda(Start):
    batches: Batches
    largest: bool

    def look(self, tuned: Tuned) -> Mapping[str, Tensor]:
        return {name: square / count for name, (count, _, square) in inputs(tuned, self.batches).items()}

    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        assert known is not None
        damped = known + 0.01 * known.diagonal().mean() * torch.eye(len(known), dtype=known.dtype)
        left, values, right = torch.linalg.svd(weight @ damped, full_matrices=False)
        chosen = slice(0, rank) if self.largest else slice(len(values) - rank, None)
        roots = (values[chosen] / abs(scale)).sqrt()
        b, a = left[:, chosen] * roots, roots[:, None] * right[chosen]
        return b * math.copysign(1, scale), torch.linalg.solve(damped, a.T).T


def corda(batches: Batches, method: str = "ipm") -> Start:
    """CorDA: B and A from ``W C = U S V^T`` with C the second moments of the inputs, ``A = S V^T C^-1`` (Yang et al. 2024,
    arXiv 2406.05223). One hundredth of C's mean diagonal is added to it, as in PEFT.

    Args:
        batches: inputs of the model, each a tensor, a tuple of arguments or a dict of keywords.
        method: ``"ipm"`` takes the largest singular values (what the inputs use most), ``"kpm"`` the smallest (to keep that).
    """
    if method not in ("ipm", "kpm"):
        raise SpecError(f"corda was given method={method!r}; choose 'ipm' or 'kpm'.")
    return _Corda(_listed("corda", batches), method == "ipm")


@dataclass(frozen=True)
class _LoraGa(Start):
    batches: Batches
    loss: Callable[[nn.Module, Any], Tensor]
    direction: str
    scale: str
    gamma: float

    def look(self, tuned: Tuned) -> Mapping[str, Tensor]:
        return gradients(tuned, self.batches, self.loss)

    def pair(self, weight: Tensor, known: Tensor | None, rank: int, scale: float) -> Pair:
        assert known is not None
        if 2 * rank > min(weight.shape):
            raise SpecError(f"lora_ga() takes 2 x {rank} directions of a gradient {tuple(weight.shape)}; choose a lower rank.")
        left, values, right = torch.linalg.svd(known, full_matrices=False)
        chosen = {
            "ArBr": (slice(0, 2 * rank, 2), slice(1, 2 * rank, 2)),
            "A2rBr": (slice(0, rank), slice(rank, 2 * rank)),
            "ArB2r": (slice(rank, 2 * rank), slice(0, rank)),
        }
        for_b, for_a = chosen[self.direction]
        b, a = left[:, for_b] * values[for_b], right[for_a]
        if self.scale == "stable":
            b = b * weight.shape[0] ** 0.25 / math.sqrt(self.gamma)
        elif self.scale == "weight_svd" and values[for_b][0] > 0:
            b = b * torch.linalg.matrix_norm(weight, 2) / values[for_b][0]
        elif self.scale == "gd_scale":
            a, b = a / scale, b / scale
        return b, a


def lora_ga(
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
) -> Start:
    """LoRA-GA: B and A from the singular vectors of the weights' gradient, so that the first step is near a full one's
    (Wang et al. 2024, arXiv 2407.05000).

    Args:
        batches: whatever `loss` takes; the gradients of all are added.
        loss: ``loss(model, batch)``, a number.
        direction: which of the 2 r largest vectors are A's and which B's, as in PEFT: ``"ArB2r"``, ``"A2rBr"`` or ``"ArBr"``.
        scale: of dW0: ``"stable"`` (out^(1/4) / gamma^(1/2)), ``"weight_svd"``, ``"gd_scale"`` or ``"unit"``.
        gamma: of the stable scale.
    """
    if direction not in DIRECTIONS or scale not in SCALES:
        raise SpecError(
            f"lora_ga was given direction={direction!r}, scale={scale!r}; choose of {', '.join(DIRECTIONS)}, and of "
            f"{', '.join(SCALES)}."
        )
    if not callable(loss):
        raise SpecError(f"lora_ga was given loss={shown(loss)}; give a function of the model and a batch.")
    check_number("lora_ga", "gamma", gamma)
    if gamma <= 0:
        raise SpecError(f"lora_ga was given gamma={gamma}; it is above 0.")
    return _LoraGa(_listed("lora_ga", batches), loss, direction, scale, gamma)


def _listed(owner: str, batches: Batches) -> tuple[Any, ...]:
    if not isinstance(batches, Iterable):
        raise SpecError(f"{owner} was given batches={shown(batches)}; give a list of inputs of the model.")
    return tuple(batches)


def start(tuned: Tuned, how: Start) -> Tuned:
    """Start an adapter anew, before it is trained; its values so far are lost.

    The model's output does not change, but for rounding. Of starts with a dW0 (`pissa`, `olora`, `corda`, `lora_ga`) the
    declarations (`tuned.entries`) and what `save` writes have twice the ranks from now on, of which one half trains; dW is
    zero. The files say which half that is, so `load` goes on training it.

    Args:
        tuned: attached, and not started so before.
        how: `pissa`, `olora`, `orthogonal`, `eva`, `corda` or `lora_ga`.

    Returns:
        The same handle.

    Raises:
        AttachError: detached, merged, started before, or a layer that the start cannot look at.
        SpecError: a network that has no such start.
    """
    _check_given(tuned, how)
    tuned._need("start")
    if tuned.merged:
        raise AttachError("the adapter is merged; unmerge() it, then start it.")
    adapters = list(tuned._adapters())
    if any(adapter._pads is not None for adapter in adapters):
        raise AttachError("the adapter departs from a start already; detach() it and attach another.")
    for entry in tuned.entries:
        entry.spec.check_added("starts are")
    departed = [_departed(entry, how) for entry in tuned.entries] if how.departs else []  # before anything is looked at
    known = how.look(tuned)
    values = [_values(tuned, how, adapter, known) for adapter in adapters]
    if how.departs:
        depart(tuned, departed, values)
        return tuned
    with torch.inference_mode(False), torch.no_grad():
        for adapter, nodes in zip(adapters, values, strict=True):
            adapter.write(nodes)
    return tuned


def _check_given(tuned: object, how: object) -> None:
    if not isinstance(tuned, Tuned):
        raise AttachError(f"start was given a {type(tuned).__name__}; give the handle that attach returns.")
    if not isinstance(how, Start):
        named = how if isinstance(how, str) else getattr(how, "__name__", "")
        known = ", ".join(f"{own}()" for own in STARTS)
        meant = f"give {named}(), called" if named in STARTS else f"give one of {known}"
        raise SpecError(f"start was given how={shown(how)}; {meant}, which says how an adapter starts.")


def _departed(entry: Entry, how: Start) -> Entry:
    """The declaration of twice the ranks, of which the given one trains."""
    try:
        whole = _doubled(entry)
    except SpecError as error:
        raise SpecError(
            f"{_name(how)}() takes its dW0 off again, as one network of twice the ranks, which this one has not: {error} "
            "Attach a network whose bonds hang together, such as lora(rank) or a Tucker."
        ) from error
    return replace(entry, spec=whole, trains=entry.spec)


def _doubled(entry: Entry) -> AdapterSpec:
    """The network of twice the ranks; SpecError where there is none."""
    whole = summed([entry.spec] * 2)
    for _, graph in whole.lay_out(entry.targets):
        blocks(graph, ())
    return whole


def _name(how: Start) -> str:
    """What the start is called."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(how).__name__).strip("_")


def _values(tuned: Tuned, how: Start, adapter: Adapter, known: Mapping[str, Tensor]) -> list[Tensor]:
    """The nodes of one group."""

    def read(name: str) -> Tensor:
        target = tuned._targets[name]
        return target.kind.read(target.layer).detach().double().cpu()

    names = list(adapter.group.members)
    if adapter.spec.scale == 0:
        raise SpecError(f"the declaration has alpha={adapter.spec.alpha}, so that dW is zero whatever it starts from.")
    plain = None if isinstance(adapter.group, FlatGroup) or len(names) > 1 else _plain(adapter.graph)
    if plain is not None:
        bond = math.prod(adapter.graph.size[i] for i in plain[2])
        if bond > min(weight := read(names[0]).shape):
            raise SpecError(
                f"'{names[0]}' is {tuple(weight)}, which has no {bond} directions to start from; choose a lower rank."
            )
        b, a = how.pair(read(names[0]), known.get(names[0]), bond, adapter.spec.scale)
        return _placed(adapter.graph, plain, b, a)
    wanted = {name: how.nearest(read(name)) for name in names}
    if any(matrix is None for matrix in wanted.values()):
        advice = "Use lora(rank)."
        with suppress(SpecError):
            _doubled(next(entry for entry in tuned.entries if names[0] in entry.targets))
            advice = "Use lora(rank), or pissa(), which starts nearest to W."
        raise SpecError(
            f"{_name(how)}() is for plain low-rank pairs B A, one for each weight; the network "
            f"'{adapter.graph.equation()}' is another. {advice}"
        )
    return _fitted(adapter.spec, wanted, adapter.graph, read)


def _plain(graph: Graph) -> tuple[int, int, tuple[str, ...]] | None:
    """Numbers of B and of A, and their bond, where the network is such a pair of trained nodes."""
    out, inward = set(graph.open("out")), set(graph.open("in"))
    if graph.terms or len(graph.nodes) != 2 or graph.open("member") or not all(node.trainable for node in graph.nodes):
        return None
    own = [set(node.indices) for node in graph.nodes]
    for b, a in ((0, 1), (1, 0)):
        bond = own[b] & own[a]
        if own[b] == out | bond and own[a] == inward | bond and not bond & (out | inward):
            return b, a, tuple(i for i in graph.nodes[b].indices if i in bond)
    return None


def _placed(graph: Graph, plain: tuple[int, int, tuple[str, ...]], b: Tensor, a: Tensor) -> list[Tensor]:
    """B (out, bond) and A (bond, in) in the order of the nodes' axes."""
    found: list[Tensor] = [b, b]
    for number, matrix, order in ((plain[0], b, graph.open("out") + plain[2]), (plain[1], a, plain[2] + graph.open("in"))):
        node = graph.nodes[number]
        whole = matrix.reshape([graph.size[i] for i in order])
        found[number] = whole.permute([order.index(i) for i in node.indices]).reshape(node.shape)
    return found


def _fitted(spec: AdapterSpec, wanted: Mapping[str, Tensor | None], graph: Graph, read: Read) -> list[Tensor]:
    """The nodes for which the network is nearest to these matrices; what frozen ones hold of the base stays theirs."""
    matrices = {name: matrix for name, matrix in wanted.items() if matrix is not None}
    shapes: dict[str, Shape] = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}
    fit = fit_weights(shapes, matrices.__getitem__, spec, Settings(200, 1e-5, 3), start=resting(spec, shapes, read))
    return [fit.tensors[tensor_name(0, node)] for node in graph.nodes]
