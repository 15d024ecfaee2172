"""Several adapters on one model: which of them act, how strongly, and on which rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType

from torch import nn

from superlora_tn.declare.parts import check_number
from superlora_tn.model.places import check_model
from superlora_tn.model.targets import AttachError, near
from superlora_tn.model.tuned import Tuned

Names = Mapping[str, float] | Sequence[str] | str | None


def handles(model: nn.Module) -> dict[str, Tuned]:
    """The adapters of a model and of its parts, by name.

    Raises:
        AttachError: two of one name; act on the parts then.
    """
    check_model(model)
    found: dict[str, Tuned] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, Tuned) and found.setdefault(name, module) is not module:
            raise AttachError(f"two adapters of the model are named '{name}'; ask the part that you mean.")
    return found


class Used:
    """What `use` gives: as a context it puts back what was used before."""

    def __init__(self, before: Sequence[tuple[Tuned, bool, float]]) -> None:
        self._before = before

    def __enter__(self) -> Used:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """All that can be put back is, and an error on its way goes on.

        Raises:
            AttachError: an adapter was merged meanwhile that was used otherwise before.
        """
        merged = [h.name for h, *before in self._before if h.merged and before != [h._enabled, h._strength]]
        refused: AttachError | None = None
        for handle, enabled, strength in self._before:
            if handle.name not in merged:
                try:
                    handle._set(enabled, strength)
                except AttachError as one:
                    refused = one
        if merged and error is None:
            raise AttachError(
                f"the adapter '{merged[0]}' was merged within use(), so what was before cannot be put back: it stays merged. "
                "unmerge() it within, or merge() it after."
            )
        if refused is not None and error is None:
            raise refused


def use(model: nn.Module, names: Names) -> Used:
    """Let exactly these adapters act, with these strengths: dW of the model is their weighted sum.

    What trains beside an adapter (`attach(also=)`) is in the model while the adapter acts, whatever its strength.

    Args:
        model: a model with adapters attached under names.
        names: name -> strength, a list of names or one name (strength 1), or None for the base alone.

    Returns:
        Something to be ignored, or used as a context: ``with sl.use(model, "style"): ...`` goes back afterwards.

    Raises:
        AttachError: a name that the model does not carry, or a merged adapter that would have to change.
    """
    known = handles(model)
    wanted = _strengths(names)
    for name, strength in wanted.items():
        if name not in known:
            raise AttachError(f"the model carries no adapter named '{name}'; {near(name, list(known))}.")
        check_number("use", f"strength of '{name}'", strength)
    before = [(handle, handle._enabled, handle._strength) for handle in known.values()]
    for name, handle in known.items():
        if handle.merged and (name in wanted, wanted.get(name, handle._strength)) != (handle._enabled, handle._strength):
            raise AttachError(f"the adapter '{name}' is merged, so it cannot be switched; unmerge() it first.")
        if (name in wanted) != handle._enabled:
            handle._check_beside(switched=True)
    used = Used(before)
    try:
        for name, handle in known.items():
            handle._set(name in wanted, float(wanted.get(name, handle._strength)))
    except BaseException as error:
        used.__exit__(type(error), error, None)
        raise
    return used


def _strengths(names: Names) -> dict[str, float]:
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    return dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within this context each row of a batch meets its own adapter, with its strength; None meets the base alone.

    Args:
        model: a model with adapters attached under names, at outputs of layers (not ``at="weight"``).
        names: one for each row of the batch, the first axis of every adapted layer's input; where that is n times as
            long (beams, tokens laid end to end), each name is for n rows in a row.

    Raises:
        AttachError: a name that the model does not carry, or that is merged or switched off, adapts weights where they are
            read, or has parameters that train beside it, where not all rows are its.
    """
    known = handles(model)
    for name in dict.fromkeys(n for n in names if n is not None):
        if name not in known:
            raise AttachError(f"the model carries no adapter named '{name}'; {near(name, list(known))}.")
        if not known[name]._enabled:
            raise AttachError(f"the adapter '{name}' is switched off, so no row would meet it; switch it on, by sl.use().")
    for name, handle in known.items():
        if handle.merged:
            raise AttachError(f"the adapter '{name}' is merged, so all rows meet it; unmerge() it first.")
        if handle._acts and handle._base.also and set(names) != {name}:
            raise AttachError(
                f"'{handle._base.also[0]}' trains beside the adapter '{name}' and is one for all rows; give all rows to it, or "
                "switch it off by sl.use()."
            )
        if handle.held and (name in names or handle._acts):
            raise AttachError(
                f"the adapter '{name}' is where the weight of '{handle.held[0]}' is read, which is one for all rows; attach or "
                "load it with at='output', or switch it off by sl.use()."
            )
    before = {name: handle._passes.rows for name, handle in known.items()}
    try:
        for name, handle in known.items():
            handle._passes.rows = (tuple(k for k, n in enumerate(names) if n == name), len(names))
        yield
    finally:
        for name, handle in known.items():
            handle._passes.rows = before[name]
