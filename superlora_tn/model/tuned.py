"""The handle of an adapted model: the adapters of all groups, and what can be done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Self

import torch
from torch import Tensor, nn

from superlora_tn.contraction.summed import Choice, routes
from superlora_tn.declare.fold import Shape
from superlora_tn.files.own import CheckpointError, Entry, Saved, read
from superlora_tn.files.standing import check_same
from superlora_tn.files.writes import FORMATS, Beside, Format, Report, save_as
from superlora_tn.model.buffers import by_each_name
from superlora_tn.model.convolutions import kernels_of
from superlora_tn.model.describe import as_given, names, notes, share_of, summary
from superlora_tn.model.frozen import thaw
from superlora_tn.model.kinds import Held
from superlora_tn.model.merging import (
    change,
    check_bakeable,
    check_finite,
    check_resettable,
    check_switched_on,
    check_unchanged,
    forget_compiled,
    leave,
    put_back,
)
from superlora_tn.model.places import check_seed
from superlora_tn.model.states import Stated, alike, finish, follow
from superlora_tn.model.targets import AttachError, Target, near
from superlora_tn.model.weights import Weight, check_mergeable, report_rounding, weight_of
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter, Member
from superlora_tn.update.passes import Passes
from superlora_tn.update.placed import applied, is_empty


class Tuned(Stated):
    """The handle `attach` returns: the adapters of a model, and what can be done with them.

    It is a sub-module of the model (so that the adapters move, save and train with it); deepcopy and pickle of the
    model carry it along, and `tuned(model)` finds it again.

    Attributes:
        entries: the declarations, each with its weights' shapes.
        adapters: one `Adapter` a group.
        merged: whether dW is in the weights now.
    """

    def __init__(
        self, entries: Sequence[Entry], adapters: Sequence[Adapter], targets: Sequence[Target], passes: Passes
    ) -> None:
        super().__init__(passes)
        self.entries = tuple(entries)
        self.adapters.extend(adapters)
        for placed in (self, *adapters):
            placed.realise = self._realise
        self.seed: int | None = None
        # Unregistered references, in plain containers: the base's keys stay as they were.
        self._targets = {target.name: target for target in targets}
        self._members = {name: member for adapter in adapters for name, member in adapter.members.items()}
        self._hooks: list[Any] = []

    def forward(self, x: Any) -> Any:
        """The identity: an nn.Sequential that carries adapters calls all its sub-modules in turn, this one too."""
        return x

    @property
    def spec(self) -> AdapterSpec:
        """The declaration as it was given; of several (see `entries`) an AttachError."""
        found = as_given(self.entries)
        if found is None:
            raise AttachError(f"this adapter has {len(self.entries)} declarations; look at .entries, one for each.")
        return found

    def __dir__(self) -> list[str]:  # torch.jit.trace reads all that is in it
        return [name for name in super().__dir__() if name != "spec" or as_given(self.entries)]  # type: ignore[no-untyped-call]

    @property
    def targets(self) -> dict[str, Shape]:
        """Adapted weights: name -> (out, in)."""
        return {name: target.shape for name, target in self._targets.items()}

    @property
    def held(self) -> list[str]:
        """Names of the weights that are adapted where they are read."""
        return [name for name, target in self._targets.items() if isinstance(target.kind, Held)]

    @property
    def num_parameters(self) -> int:
        """Trainable parameters of all adapters."""
        return sum(a.num_parameters for a in self._adapters())

    def _member(self, target: str) -> Member:
        if target not in self._members:
            raise AttachError(f"'{target}' is not adapted; {near(target, self._members)}.")
        return self._members[target]

    def delta(self, target: str) -> Tensor:
        """dW of one target as it stands, scale included, shape (out, in); of other joins than the sum it is W' - W.

        Raises:
            AttachError: no such target; or its join needs W, which holds the adapter now (merged).
        """
        return change(self._member(target), self._targets)

    def plan(self, target: str, tokens: int) -> Choice:
        """Both routes of one target, of a sum those of each network, for so many rows of x, priced for its device; print it.

        Raises:
            AttachError: no such target.
        """
        adapter = self._member(target).adapter
        return routes(adapter.graph, adapter.members[target].shape, tokens, adapter.profile, adapter.settings.optimize)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Give all nodes their first values again (dW is zero), for instance after `to_empty`.

        Args:
            seed: of the values; None takes the seed of `attach`, or without one draws anew.
        """
        check_resettable(self._adapters(), self._weights())
        seed = self.seed if seed is None else seed
        check_seed(seed)

        def fill() -> None:
            generator = None if seed is None else torch.Generator().manual_seed(int(seed))
            for adapter in self._adapters():
                adapter.refill(generator)
                adapter.rest_on(lambda name: self._targets[name].weight())

        finish(fill)

    def _is_empty(self) -> bool:
        return any(is_empty(adapter.stored()) for adapter in self._adapters())

    def _realise(self) -> None:
        """First values for nodes without memory, where the processor is."""
        if self._is_empty():
            self.to_empty(device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `to_empty` and the like do; nodes that had no memory before start with their first values."""
        before = self._is_empty()
        super()._apply(applied(fn), recurse)  # type: ignore[no-untyped-call]
        if before and not self._is_empty():
            self.reset_parameters()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        if self._acts or self.held:
            raise AttachError(
                "nn.DataParallel copies layers to other devices, where they would meet the adapter's nodes on the first; take "
                "DistributedDataParallel, or a model without a handle (tuned.bake())."
            )
        return super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]

    def _need(self, what: str) -> nn.Module:
        if self._model is None:
            raise AttachError(f"cannot {what}: the adapter is detached; attach it again.")
        return self._model[0]

    def _weights(self) -> dict[str, Weight]:
        return {name: weight_of(target) for name, target in self._targets.items()}

    def merge(self) -> None:
        """Add dW to the weights, rounding once, and switch the adapters off. The weights' bytes are kept for `unmerge`.

        All or nothing: whatever breaks it off, an interrupt too, the weights are as before.

        Raises:
            AttachError: already merged, detached, switched off (`use`), dW not finite, or a weight that cannot hold it:
                quantised, sharded, shared with other modules, computed from others, or of a layer that was replaced.
        """
        self.check_mergeable()
        try:
            with torch.no_grad(), self._passes.opened():
                for name, weight in self._weights().items():
                    delta = self._members[name].current()
                    weight.add(self._members[name], delta)
                    check_finite(name, weight, delta)
                    weight.settle()
            self.merged = True
            self._switch()
        except BaseException:
            self.merged = False
            self._put_back()
            self._switch()
            raise
        report_rounding(self._weights())

    def check_mergeable(self) -> None:
        """Raise where `merge` would, whatever dW is: to be asked before training for a merged result. No value is changed.

        Raises:
            AttachError: as `merge`, but for a dW that is not finite.
        """
        model = self._need("merge")
        if self.merged:
            raise AttachError("the adapter is merged already; unmerge() first, or leave it.")
        check_switched_on(self.name, self._enabled)
        self._put_back()
        check_mergeable(model, list(self._targets.values()))

    def _put_back(self) -> None:
        """Take this handle's dW out of all weights that hold it."""
        put_back(self._weights(), self._members)

    def unmerge(self, force: bool = False) -> None:
        """Put the weights' own bytes back and switch the adapters on.

        All or nothing: where an interrupt breaks it off, it is finished first.

        Args:
            force: also where a weight was changed while merged; the change is lost.

        Raises:
            AttachError: not merged, or a weight was changed while merged.
        """
        if not self.merged:
            raise AttachError("the adapter is not merged, so there is nothing to unmerge.")
        if not force:
            check_unchanged(self._weights())
        finish(self._take_out)

    def _take_out(self) -> None:
        self._put_back()
        self.merged = False
        self._switch()

    def detach(self) -> nn.Module:
        """Take the adapters off and return the model bit for bit as it was (unmerged, its requires_grad restored).

        Buffers of the base that training changed beside the adapter (running means of BatchNorm) are put back too.

        Raises:
            AttachError: detached already, or merged and changed since (see `unmerge`).
        """
        self._need("detach")
        self._check_beside(self._members.values())
        if self.merged:
            self.unmerge()
        self._put_back()
        return self._leave()

    def bake(self) -> nn.Module:
        """Merge for good: the plain model with W + dW in its weights, without a hook or a handle, its requires_grad restored.

        An interrupt leaves it not begun, merged, or done.

        Raises:
            AttachError: as `merge`; or another adapter is merged into one of the weights.
        """
        self._need("bake")
        check_bakeable(self._weights(), self._members)
        if not self.merged:
            self.merge()
        return self._leave(keep=True)

    def _leave(self, keep: bool = False) -> nn.Module:
        """Take hooks and handle off the model, and thaw what was frozen; keep what is merged, or what is the base's again."""
        assert self._model is not None
        model, name = self._model
        finish(lambda: self._go(model, name, keep))
        return model

    def _go(self, model: nn.Module, name: str, keep: bool) -> None:
        if keep:
            for weight in self._weights().values():
                weight.forget()
            self.merged = False
        self._base.leave(keep)
        for hook in self._hooks:
            hook.remove()
        leave(self._targets, self._members)
        follow(model)
        for _, parameter, wanted in self._frozen:
            thaw(parameter, self._holder, wanted)
        model._modules.pop(name, None)
        forget_compiled()
        self._hooks, self._frozen, self._model = [], [], None
        self._switch()  # quantize_dynamic and others have copied hooks to layers of their own

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes as its base, also where it was merged; a merge within it is one.

        What trains beside the adapter, and buffers that no other adapter knows, are the base's own meanwhile.
        """
        was_merged = self.merged
        self._check_beside(self._members.values(), switched=True)
        self._disabled += 1
        try:
            if was_merged:
                self.unmerge()
            self._switch()
            yield
        finally:
            self._disabled -= 1
            self._switch()
            if was_merged and not self.merged:
                self.merge()

    @contextmanager
    def fixed(self) -> Iterator[None]:
        """Within this context calls without gradients share with one another what does not depend on the input.

        For evaluation and generation: dW of a flat fold, say, is built once in all rather than once a call. Values that an
        optimizer or `copy_` writes in between are seen; values written through ``.data`` are not.
        """
        with self._passes.fixed():
            yield

    def save(self, folder: str | PathLike[str], format: Format = "superlora", **options: Any) -> Report:
        """Write the adapter's two files; whatever interrupts it, a loadable adapter remains.

        What trains beside it (`attach(also=)`) is written with it, and so are buffers of the base that training changed
        (running means of BatchNorm). The strength is not: it belongs to the use of an adapter, not to the adapter.
        Sharded nodes (FSDP2) are gathered, so all processes have to call it.

        Args:
            folder: made where it does not exist; for formats of one file, that file.
            format: ``"superlora"``, or another library's: ``"peft"``, ``"lycoris"``, ``"kohya"``, ``"diffusers"``,
                ``"gguf"``: by its own method where it has it, else as plain LoRA.
            options: `rank`, `error`, `dtype`, `prefix` and others of `files.writes.save_as`.

        Returns:
            The files, and for other formats what became of each weight, with its relative error; print it.

        Raises:
            CheckpointError: nodes that are not whole here, something that the format cannot hold, a folder that cannot be
                written, or that holds another adapter in this library's own format, where another is asked for.
        """
        now = self._saved()
        values = now.buffers
        if format in FORMATS[1:]:  # this library's own is read before any other
            check_same(folder, now)
            values = values if self._model is None else by_each_name(self._model[0], values)
        beside = Beside(replaced=values, known=self._base.known)
        more: Any = {"kernels": kernels_of(self._targets.values(), format), "beside": beside, **options}
        return save_as(now.entries, now.tensors, folder, format, **more)

    def _saved(self) -> Saved:
        """As it would be saved now; the nodes' tensors are those in use."""
        self._check_beside()
        pairs = (p for k, a in enumerate(self._adapters()) for p in zip(names(k, a), a.whole(), strict=True))
        return Saved(self.entries, {name: tensor.detach() for name, tensor in pairs}, self._base.to_save())

    def replace(self, folder: str | PathLike[str]) -> None:
        """Take the values of a saved adapter of the same declaration and targets, in place: nothing is compiled again.

        Args:
            folder: what `save` wrote.

        Raises:
            CheckpointError: damaged, or of another declaration.
            AttachError: merged.
        """
        if self.merged:
            raise AttachError("the adapter is merged, so other values would not be what is in the weights; unmerge() first.")
        self._check_beside()
        saved = read(folder)
        if saved.entries != self.entries:
            raise CheckpointError(
                f"{folder} has another declaration or other targets than the adapter in place; detach() and load() it."
            )
        self._take(saved, keep_dtype=True)

    def _take(self, saved: Saved, keep_dtype: bool) -> None:
        """Write saved values into the nodes and what is kept of the base; nothing is written where one does not fit."""
        shapes = self._base.shapes
        wrong = next((n for n, b in saved.buffers.items() if shapes.get(n) != tuple(b.shape)), None)
        if wrong is not None:
            raise CheckpointError(f"this base has no '{wrong}' of shape {tuple(saved.buffers[wrong].shape)}, as was saved.")

        def write() -> None:
            with torch.inference_mode(False), torch.no_grad():
                for k, adapter in enumerate(self._adapters()):
                    values = alike([saved.tensors[name] for name in names(k, adapter)], len(adapter.graph.nodes))
                    adapter.write(values, keep_dtype)
            self._base.take(saved.buffers)

        finish(write)

    def __str__(self) -> str:
        share = "" if self._model is None else share_of(self._model[0], self.num_parameters, self._base.also)
        scales = ", ".join(f"{scale:g}" for scale in dict.fromkeys(entry.spec.scale for entry in self.entries))
        head = f"{len(self._targets)} weights, {self.num_parameters:,} trainable parameters{share}, scale {scales}"
        state = "merged" if self.merged else "detached" if self._model is None else "attached"
        return "\n".join([f"{head}, {state}", *summary(list(self._adapters()), self.held), *notes(self.entries, self.held)])

    __repr__ = __str__
