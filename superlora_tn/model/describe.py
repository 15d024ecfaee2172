"""Adapters in words: the table that printing a handle shows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch import nn

from superlora_tn.contraction.plan import choose, table, weight_price
from superlora_tn.contraction.summed import crop_price, padded_shape
from superlora_tn.declare.fold import FlatGroup, PhysicalFold, split_name
from superlora_tn.declare.joins import Join, Multiply
from superlora_tn.files.record import Entry, names_of
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter

TOKENS = 1024


def summary(adapters: Sequence[Adapter], held: Collection[str] = ()) -> list[str]:
    """Rows of a table: groups, weights, modes, ranks, parameters, route and price; equal groups share a row.

    Args:
        adapters: of a handle.
        held: names of weights that are adapted where they are read, whose dW is added to them: the route "weight".
    """
    rows = [("groups", "weights", "modes", "ranks", "parameters", "route", f"price of one at {TOKENS} tokens")]
    alike: dict[tuple[str, ...], list[Adapter]] = {}
    for adapter in adapters:
        alike.setdefault(_describe(adapter, held), []).append(adapter)
    for (kinds, modes, ranks, route, price), group in alike.items():
        members = sum(len(a.group.members) for a in group)
        parameters = sum(a.num_parameters for a in group)
        rows.append((f"{len(group)}", f"{members} ({kinds})", modes, ranks, f"{parameters:,}", route, price))
    return table(rows, "groups parameters")


def as_given(entries: Sequence[Entry]) -> AdapterSpec | None:
    """The one declaration, without the sizes of kernels of which `attach` made an entry each; None where there are several."""
    if len(entries) == 1:
        return entries[0].spec
    open_ = {
        replace(s, fold=replace(s.fold, kernel=None)) if isinstance(s.fold, PhysicalFold) else s
        for s in (e.spec for e in entries)
    }
    return open_.pop() if len(open_) == 1 else None


def _describe(adapter: Adapter, held: Collection[str]) -> tuple[str, str, str, str, str]:
    """A group in words: kinds of weights, modes, ranks, route and price. Equal groups share a row."""
    kinds = list(dict.fromkeys(split_name(n)[1] for n in adapter.group.members))
    networks = [term.graph for term in adapter.graph.networks]
    bonds = [s for one in networks for i, s in one.sizes if i not in {i for _, indices in one.modes for i in indices}]
    ranks = f"{bonds[0]}" + (f" x{len(bonds)}" if len(bonds) > 1 else "") if len(set(bonds)) == 1 else " ".join(map(str, bonds))
    shape = next(iter(adapter.group.members.values()))[1:] if isinstance(adapter.group, FlatGroup) else adapter.group.shape
    terms, rest = adapter.graph.networks, (TOKENS, adapter.profile)
    shapes = [padded_shape(term) if term.crops else (shape[0], shape[1]) for term in terms]
    choices = [choose(t.graph, own, *rest, adapter.settings.optimize) for t, own in zip(terms, shapes, strict=True)]
    if held and all(name in held for name in adapter.group.members):
        routes, prices = ["weight"], [weight_price(choice) for choice in choices]
    else:
        routes = [adapter.settings.route or choice.route for choice in choices]
        prices = [
            choice.apply.price if route == "apply" and choice.apply else choice.delta_price
            for choice, route in zip(choices, routes, strict=True)
        ]
        prices += [crop_price(term, (shape[0], shape[1]), *rest) for term in terms]
    return (
        f"{', '.join(kinds[:2])}{', ...' if len(kinds) > 2 else ''}",
        " ".join(f"{mode.name}={mode.size}" for mode, _ in adapter.graph.modes),
        ranks or "-",
        " + ".join(dict.fromkeys(routes)),
        f"{sum(prices) * 1e3:.2f} ms",
    )


def names(number: int, adapter: Adapter) -> list[str]:
    """Under which names an adapter of this number is saved: all of `Adapter.whole`."""
    return list(names_of(number, adapter.spec, adapter.group, adapter.graph))


def notes(entries: Sequence[Entry], held: Sequence[str]) -> list[str]:
    """Lines behind the table: how updates join weights where they are not added, and which are where the weight is read."""
    found: dict[Join, int] = {}
    for entry in entries:
        if entry.spec.join is not None:
            found[entry.spec.join] = found.get(entry.spec.join, 0) + len(entry.targets)
    lines = [f"{count} {_joined(join)}" for join, count in found.items()]
    more = ", ..." if len(held) > 1 else ""
    return lines + ([f"{len(held)} adapted where the weight is read ({held[0]}{more})"] if held else [])


def _joined(join: Join) -> str:
    """What becomes of weights to which nothing is added: to be read behind their number."""
    if isinstance(join, Multiply):
        like = ", as OFT and the like do" if join.side == "right" else ""
        return f"multiplied from the {join.side} by the network N{like}: {join}"
    return f"with {join}"


def share_of(model: nn.Module, trained: int, also: Sequence[str]) -> str:
    """How much of the model trains, and what of it is the base's own: for behind the number of the adapter's parameters."""
    beside = sum(p.numel() for n, p in model.named_parameters() if n in also)
    whole = sum(p.numel() for p in model.parameters())
    share = f", {(trained + beside) / max(whole, 1):.2%} of the model"
    return share + (f" with {beside:,} of the base's own ({', '.join(also[:3])})" if beside else "")
