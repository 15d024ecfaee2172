"""What a start looks at in a model: what flows into its layers, and the gradient of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from superlora_tn.model.convolutions import Convolution
from superlora_tn.model.kinds import Linear, RowsOf
from superlora_tn.model.targets import AttachError, Target
from superlora_tn.model.tuned import Tuned

Seen = dict[str, tuple[int, Tensor, Tensor]]


def inputs(tuned: Tuned, batches: Iterable[Any]) -> Seen:
    """Count, sum (in) and squares (in, in) of the rows that flow into each adapted layer, in float64.

    Args:
        tuned: the adapter.
        batches: inputs of its model, each a tensor, a tuple of arguments or a dict of keywords.

    Raises:
        AttachError: a layer that is not adapted at its output, or that no batch reaches.
    """
    seen: Seen = {}
    with _watched(tuned, seen), torch.no_grad(), tuned.disabled():
        for batch in batches:
            _call(tuned._need("start"), batch)
    missed = next((name for name in tuned.targets if name not in seen), None)
    if missed is not None:
        raise AttachError(f"no batch reached '{missed}', so nothing is known of its inputs; give batches that run it.")
    return seen


def gradients(tuned: Tuned, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]) -> dict[str, Tensor]:
    """The gradient of each adapted weight, (out, in), added over batches, in float64.

    Raises:
        AttachError: a weight that has none of its own, or no batch at all.
    """
    model, found = tuned._need("start"), dict[str, Tensor]()
    with _unfrozen(tuned) as owners, tuned.disabled():
        for batch in batches:
            with torch.enable_grad():
                number = loss(model, batch)
            grads = torch.autograd.grad(number, list(owners.values()), allow_unused=True)
            for (name, owner), grad in zip(owners.items(), grads, strict=True):
                if grad is None:
                    raise AttachError(f"the loss does not depend on the weight of '{name}'; lora_ga() needs its gradient.")
                matrix = _as_matrix(tuned._targets[name], owner, grad).double().cpu()
                found[name] = found[name] + matrix if name in found else matrix
    if not found:
        raise AttachError("lora_ga() was given no batch; give one at least.")
    return found


def _call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a tensor, a tuple of arguments or a dict of keywords."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def _watched(tuned: Tuned, seen: Seen) -> Iterator[None]:
    """Within this context count, sum and squares of each layer's inputs are gathered, in float64."""
    hooks = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            rows = _rows(layer, x.detach().double().cpu())
            count, total, square = seen.get(name, (0, torch.zeros(1), torch.zeros(1)))
            seen[name] = (count + len(rows), total + rows.sum(0), square + rows.T @ rows)

        return hook

    try:
        for name, target in tuned._targets.items():
            if not isinstance(target.kind, Linear | RowsOf) and not _is_unfoldable(target):
                raise AttachError(
                    f"'{name}' is a {type(target.layer).__name__} that is not adapted at the output of a linear layer or of a "
                    "convolution without groups in one or two dimensions, whose inputs alone a start can look at; leave it "
                    "out, or take another start."
                )
            hooks.append(target.layer.register_forward_pre_hook(watch(name), with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_unfoldable(target: Target) -> bool:
    """Whether a layer is a convolution whose patches torch can lay out as rows."""
    layer = target.layer
    return type(target.kind) is Convolution and isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a weight (out, in) is multiplied by, (rows, in): of a convolution the patches that its kernel meets."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    x = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    sizes, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        x, sizes, dilation, stride = x[:, :, None], (1, *sizes), (1, *dilation), (1, *stride)
    return functional.unfold(x, sizes, dilation, 0, stride).mT.flatten(0, 1)


@contextmanager
def _unfrozen(tuned: Tuned) -> Iterator[dict[str, Tensor]]:
    """Within this context the adapted parameters take gradients; by target."""
    owners: dict[str, Tensor] = {}
    for name, target in tuned._targets.items():
        own = list((target.kind.owners(target.layer) or {}).values())
        if len(own) != 1 or not own[0].is_floating_point() or target.kind.refusal(target.layer) or target.tied:
            raise AttachError(
                f"the weight of '{name}' has no gradient of its own (packed, tied or computed); lora_ga() needs one."
            )
        owners[name] = own[0]
    before = [(owner, owner.requires_grad) for owner in owners.values()]
    try:
        for owner in owners.values():
            owner.requires_grad_(True)
        yield owners
    finally:
        for owner, was in before:
            owner.requires_grad_(was)


def _as_matrix(target: Target, owner: Tensor, grad: Tensor) -> Tensor:
    """A parameter's gradient as the matrix (out, in) that its layer's kind reads from the parameter."""
    kept = owner.data
    try:
        owner.data = grad
        return target.kind.read(target.layer).detach().clone()
    finally:
        owner.data = kept
