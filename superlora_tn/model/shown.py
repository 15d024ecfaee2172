"""Weights that show W + dW to whoever reads them: for modules that use a weight without calling its layer.

The module's class is replaced, for this one instance, by a subclass in which the parameter's name is a property. The
parameter itself stays where it was, so state dicts, optimizers and `named_parameters` see W under its own name. Nothing is
kept on the module while it runs, so threads do not meet; copies and pickles carry the property along.
"""

from __future__ import annotations

import copyreg
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from superlora_tn.declare.rows import Span
from superlora_tn.model.kinds import Held, LayerError, Shows
from superlora_tn.model.spans import cut, meet, replaced
from superlora_tn.model.stacks import Stack
from superlora_tn.update.base import Member
from superlora_tn.update.eager import is_eager
from superlora_tn.update.joined import joined
from superlora_tn.update.passes import state, unseen

SLOT = "_superlora_shown"
# Functions that read a weight to put the same on another device, or to look whether it is still theirs: accelerate's, FSDP2's.
MOVERS = ("set_module_tensor_to_device", "reset_sharded_param")


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of a parameter to which one member's dW is added."""

    kind: Held
    member: Member


def show(module: nn.Module, block: Block) -> None:
    """From now on, reading the block's parameter gives W + dW in its rows, while the adapter is active.

    Raises:
        LayerError: the module's class cannot be replaced, or the parameter is computed from others.
    """
    block.kind.stored(module)
    if block.kind.slot is not None:
        block.member.adapter.stack_up()
    blocks: dict[str, tuple[Block, ...]] = dict(module.__dict__.get(SLOT, {}))
    blocks[block.kind.parameter] = (*blocks.get(block.kind.parameter, ()), block)
    _put(module, blocks)


def hide(module: nn.Module, block: Block) -> None:
    """Take a block away; without any, the module has its own class again."""
    blocks: dict[str, tuple[Block, ...]] = dict(module.__dict__.get(SLOT, {}))
    left = tuple(b for b in blocks.get(block.kind.parameter, ()) if b is not block)
    blocks = {name: own for name, own in {**blocks, block.kind.parameter: left}.items() if own}
    _put(module, blocks)


def blocks_of(module: nn.Module) -> list[Block]:
    """All blocks of a module."""
    return [block for own in module.__dict__.get(SLOT, {}).values() for block in own]


def _put(module: nn.Module, blocks: dict[str, tuple[Block, ...]]) -> None:
    own: Any = type(module)
    plain = own._superlora_plain if issubclass(own, Shows) and "_superlora_plain" in own.__dict__ else own
    if issubclass(plain, Shows):  # a class was laid over ours since (FSDP's, parametrize's): its property reads what is left
        module.__dict__[SLOT] = blocks
        return
    try:
        module.__class__ = _showing(plain, tuple(sorted(blocks))) if blocks else plain
    except TypeError as error:
        raise LayerError(f"is a {plain.__name__}, whose class cannot be replaced to show W + dW ({error}).") from error
    if blocks:
        module.__dict__[SLOT] = blocks
    else:
        module.__dict__.pop(SLOT, None)


@lru_cache(maxsize=1024)
def _showing(plain: type, names: tuple[str, ...]) -> type:
    """The subclass of a module's class in which these parameters are properties."""
    body: dict[str, Any] = {name: property(_getter(name)) for name in names}
    if issubclass(plain, nn.RNNBase):  # it reads all its weights from a list of its own
        body = {"_flat_weights": property(_flat_weights, _keep_flat_weights)}
    body |= {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": _reduced,
        "_superlora_plain": plain,
    }
    return type(plain.__name__, (plain, Shows), body)


def _reduced(self: Any, protocol: Any) -> Any:
    plain, names = type(self)._superlora_plain, tuple(sorted(self.__dict__[SLOT]))
    return (_made, (plain, names), self.__dict__.copy())


def _made(plain: type, names: tuple[str, ...]) -> Any:
    module = copyreg.__newobj__(plain)  # type: ignore[attr-defined]
    object.__setattr__(module, "__class__", _showing(plain, names))
    return module


def _getter(name: str) -> Any:
    def read(module: nn.Module) -> Any:
        try:
            return _read(module, name)
        except AttributeError as error:  # it would send nn.Module on to the parameter itself, and nobody would know
            raise RuntimeError(f"W + dW of the {name} of a {type(module).__name__} could not be computed.") from error

    return read


def _flat_weights(module: Any) -> list[Any]:
    """The weights of an LSTM or GRU in its order, W + dW where it is shown."""
    shown = module.__dict__[SLOT]
    return [_read(module, name) if name in shown else module._parameters.get(name) for name in module._flat_weights_names]


def _keep_flat_weights(module: Any, weights: list[Any]) -> None:
    """For the module's own class, when it has that again."""
    module.__dict__["_flat_weights"] = weights


def _read(module: nn.Module, name: str) -> Any:
    """What reading a shown parameter of a module gives."""
    stored = module._parameters.get(name)
    blocks = [b for b in module.__dict__[SLOT].get(name, ()) if b.member.active]
    if stored is None or not blocks or (is_eager() and sys._getframe(2).f_code.co_name in MOVERS):
        return stored
    if (members := _apart(stored, blocks)) is not None:
        return Stack.of(stored, lambda: _whole(module, name, stored, blocks), members, blocks[0].kind.transposed)
    return _whole(module, name, stored, blocks)


def _apart(stored: Tensor, blocks: list[Block]) -> list[list[Member]] | None:
    """The members on each matrix of a stack, where those need not be built to be read.

    In DistributedDataParallel they are, as it waits for a gradient of every parameter, and an expert may meet no token.
    """
    if blocks[0].kind.slot is None or type(stored) not in (Tensor, nn.Parameter):
        return None
    if not is_eager() or DistributedDataParallel._get_active_ddp_module():  # type: ignore[no-untyped-call]
        return None
    members: list[list[Member]] = [[] for _ in range(len(stored))]
    for block in blocks:
        kind, adapter = block.kind, block.member.adapter
        if kind.slot is None or kind.span is not None or kind.built or not adapter.applies:
            return None
        members[kind.slot].append(block.member)
    return members


def _whole(module: nn.Module, name: str, stored: Tensor, blocks: list[Block]) -> Tensor:
    """W + dW, made once for all reads of a pass that follow one another."""
    found = blocks[0].member.adapter.passes.current() if is_eager() else None
    adapters = list({id(b.member.adapter): b.member.adapter for b in blocks}.values())
    read = [stored, *(t for adapter in adapters for t in adapter.whole())]
    if found is None or (now := state(read)) is None:
        with unseen() if is_eager() else nullcontext():
            return _updated(stored, blocks)
    # A module reads its weights several times in a row.
    scales = [adapter.scale for adapter in adapters]
    key = (now, scales, stored.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    if found.shown[0] is not module:
        found.shown = (module, {})
    held = found.shown[1].get(name)
    if held is None or held[0] != key:
        with unseen():
            held = found.shown[1][name] = (key, read, _updated(stored, blocks))
    return held[2]


def _updated(stored: Tensor, blocks: list[Block]) -> Tensor:
    """W + dW, in W's dtype; untouched rows are W's own."""
    if (whole := _stacked(stored, blocks)) is not None:
        return whole
    slots = dict.fromkeys(block.kind.slot for block in blocks)
    new = {slot: _matrix(stored, [block for block in blocks if block.kind.slot == slot]) for slot in slots}
    return new[None] if None in new else torch.stack([new.get(k, stored[k]) for k in range(len(stored))])


def _stacked(stored: Tensor, blocks: list[Block]) -> Tensor | None:
    """W + dW of a stack whose matrices are all the members of one adapter, built at once."""
    first, every = blocks[0], [(k, None) for k in range(len(stored))]
    if first.kind.slot is None or [(block.kind.slot, block.kind.span) for block in blocks] != every:
        return None
    adapter = first.member.adapter
    same = adapter.spec.join is None and all(block.member.adapter is adapter for block in blocks)
    delta = adapter.together([block.member for block in blocks]) if same else None
    if delta is None:
        return None
    return (stored + (delta.mT if first.kind.transposed else delta)).to(stored.dtype)


def _matrix(stored: Tensor, blocks: list[Block]) -> Tensor:
    """The blocks' matrix as it is stored, W + dW in their rows; dW of several adapters on the same row add up."""
    kind = blocks[0].kind
    matrix = kind.matrix(stored)
    sums: dict[Span | None, Tensor] = {}
    for block in blocks:
        span, delta = block.kind.span, block.member.current()
        if block.kind.transposed != kind.transposed:  # a table by itself, and with the output layer that it is tied to
            delta = delta.t()
        if any(meet(span, other) for other in sums if other != span):
            matrix, sums = replaced(matrix, list(sums.items())), {}
        sums[span] = joined(block.member, sums[span] if span in sums else cut(matrix, span), delta)
    # Rounded once, as merging does.
    whole = replaced(matrix.to(stored.dtype), [(span, rows.to(stored.dtype)) for span, rows in sums.items()])
    own = stored if kind.slot is None else stored[kind.slot]
    return whole.t() if kind.transposed else whole.reshape(own.shape)
