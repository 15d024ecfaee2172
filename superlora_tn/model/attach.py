"""Attach adapters to a model. Together with `tuned`, the only code that alters a user's model.

Layers get a forward hook, or show W + dW to whoever reads their weight; they keep their names and their state-dict keys. The
adapters of all groups live once, in one `Tuned` that is registered as a sub-module of the model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike

import torch
from torch import nn

from superlora_tn.contraction.backend import DEFAULT
from superlora_tn.contraction.plan import Route
from superlora_tn.contraction.search import Optimizer
from superlora_tn.declare.checks import check_flag
from superlora_tn.declare.rows import Span
from superlora_tn.files.own import Entry
from superlora_tn.model.beside import also_trained
from superlora_tn.model.buffers import Snapshot
from superlora_tn.model.chosen import placed
from superlora_tn.model.frozen import freeze, train, was_trainable
from superlora_tn.model.joins import bound, enters
from superlora_tn.model.kernels import by_kernel
from superlora_tn.model.kinds import Held
from superlora_tn.model.merging import forget_compiled
from superlora_tn.model.places import check_model, check_seed, check_shaped, declared
from superlora_tn.model.saved import At, check_base, depart, read_for
from superlora_tn.model.shown import Block, show
from superlora_tn.model.site import BeginHook, EndHook, EnterHook, UpdateHook, watchers
from superlora_tn.model.states import follow
from superlora_tn.model.targets import AttachError, Place, Target, Targets, bind, is_sharded, match, match_ends, places
from superlora_tn.model.trainer import admissions
from superlora_tn.model.tuned import Tuned
from superlora_tn.model.weights import check_alone, check_apart, enlist
from superlora_tn.network.budget import Budget
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.update.base import Adapter, Settings
from superlora_tn.update.make import make_adapter
from superlora_tn.update.passes import Passes

NAME = "superlora"
Specs = AdapterSpec | Budget | Mapping[str, AdapterSpec | Budget]


@dataclass(frozen=True)
class _Request:
    """What is to be attached, and how.

    Attributes:
        entries: declarations, each with the names of its targets.
        name: of the handle in the model.
        dtype: of the nodes.
        at: where targets are adapted; None lets each layer decide.
        seed: of the first values.
        settings: how the adapters compute.
        also: full names of the parameters that train beside them.
        rows: blocks of fused layers that were declared, by their names.
        is_saved: whether all values come from a file.
    """

    entries: tuple[tuple[AdapterSpec, tuple[str, ...]], ...]
    name: str
    dtype: torch.dtype
    at: At | None
    seed: int | None
    settings: Settings
    also: tuple[str, ...] = ()
    rows: Mapping[str, Span] = field(default_factory=dict)
    is_saved: bool = False


def attach(
    model: nn.Module,
    spec: Specs,
    targets: Targets | None = None,
    *,
    exclude: Targets = (),
    only_layers: Sequence[int] | None = None,
    name: str = NAME,
    dtype: torch.dtype = torch.float32,
    at: At | None = None,
    route: Route | None = None,
    backend: str = DEFAULT,
    optimize: Optimizer = "dp",
    recompute: bool = False,
    also: Sequence[str] = (),
    seed: int | None = None,
) -> Tuned:
    """Attach an adapter to a model: freezes it, and leaves only the adapter's parameters trainable.

    Args:
        model: any torch model.
        spec: the declaration, or a budget, which buys one for the targets' shapes (see `variants.superlora`); or several,
            by patterns of the ends of names: ``{"q_proj|v_proj": sl.lora(8), "up_proj": sl.lokr(4)}``.
        targets, exclude, only_layers: which weights, see `match`; with several declarations the patterns say so, or which of
            these targets each declaration is for.
        name: under which name the handle is registered in the model; adapters of different names may be on one weight.
        dtype: of the adapter's parameters, whatever the model's.
        at: ``"weight"`` adapts weights where they are read: reading ``layer.weight`` gives W + dW, which is right for any
            module, and builds dW for each call. ``"output"`` adds to the layers' outputs. None takes the output of layers
            that run as their type says, and the weight of others and where a dW that is built anyway is cheaper there.
        route: force "apply" or "delta"; None takes the cheaper one, call by call.
        backend: the backend's name.
        optimize: "dp" or any opt_einsum optimizer.
        recompute: on linear layers, a flat fold builds each weight's dW in forward and again in backward and keeps none.
        also: parameters of the base that train beside the adapter: names of modules or their endings (``"classifier"``),
            or patterns of parameters' names (``"*.bias"``). They are saved with the adapter and put back by `detach`.
        seed: of the adapter's first values; None draws from torch's generator, and where torch.distributed runs, the same
            values in all processes (which all have to attach, then).

    Returns:
        The handle: print it, merge, save, detach.

    Raises:
        AttachError: a target that is not there, cannot be adapted or is adapted already, or a name in use.
        SpecError: the declaration does not fit the targets' shapes.
    """
    settings = Settings(backend, route, optimize, recompute)
    named = _named(model, spec, targets, exclude, only_layers)
    beside = also_trained(model, also)
    rows = declared(model, targets)
    entries = by_kernel(model, _bought(model, named, at, rows), at, rows)
    return _attach(model, _Request(entries, name, dtype, at, seed, settings, beside, rows))


def _named(
    model: nn.Module, spec: Specs, targets: Targets | None, exclude: Targets, only_layers: Sequence[int] | None
) -> list[tuple[AdapterSpec | Budget, tuple[str, ...]]]:
    """Each declaration with the names of its targets."""
    if not isinstance(spec, Mapping) or not spec:
        if not isinstance(spec, AdapterSpec | Budget):
            raise AttachError(f"attach was given spec={spec!r}; give an AdapterSpec such as superlora_tn.lora(8).")
        if targets is None:
            raise AttachError("attach was given no targets; name the layers, for instance targets=['q_proj', 'v_proj'].")
        return [(spec, tuple(match(model, targets, exclude, only_layers)))]
    among = None if targets is None else match(model, targets, exclude, only_layers)
    entries: list[tuple[AdapterSpec | Budget, tuple[str, ...]]] = []
    taken = set[str]()
    for pattern, one in spec.items():
        if not isinstance(one, AdapterSpec | Budget):
            raise AttachError(f"attach was given {one!r} for '{pattern}'; give an AdapterSpec such as superlora_tn.lora(8).")
        names = match_ends(model, pattern, among, () if targets is None else targets, exclude, only_layers)
        own = tuple(n for n in names if n not in taken)
        if not own:
            raise AttachError(f"the pattern '{pattern}' leaves no layer to adapt: the patterns before it take all it matches.")
        taken.update(own)
        entries.append((one, own))
    return entries


def _bought(
    model: nn.Module, named: Sequence[tuple[AdapterSpec | Budget, tuple[str, ...]]], at: At | None, rows: Mapping[str, Span]
) -> tuple[tuple[AdapterSpec, tuple[str, ...]], ...]:
    """The declarations, budgets turned into what they buy."""
    known = places(model, rows) if any(isinstance(spec, Budget) for spec, _ in named) else {}
    found: list[tuple[AdapterSpec, tuple[str, ...]]] = []
    for spec, names in named:
        if isinstance(spec, Budget):
            own = [bind(name, known[name], at) for name in names]
            spec = spec.choose({t.name: t.shape for t in own}, {t.name: t.kernel for t in own}).spec
        found.append((spec, names))
    return tuple(found)


def _attach(model: nn.Module, request: _Request) -> Tuned:
    """Attach as a whole, or leave the model and torch's generator as they were."""
    state = torch.get_rng_state()
    try:
        return _attached(model, request)
    except BaseException:
        torch.set_rng_state(state)
        raise


def _attached(model: nn.Module, request: _Request) -> Tuned:
    """Everything that can fail comes before the first change of the model."""
    _check_asked(request)
    _check_name(model, request.name)
    known = places(model, request.rows)
    named = [(spec, [bound(spec.join, n, known[n], request.at) for n in names]) for spec, names in request.entries]
    where = (known, request.at, request.dtype, request.settings)
    check_shaped(model)
    entries = [(spec, placed(spec, targets, *where)) for spec, targets in named]
    for spec, targets in entries:
        _check_targets(spec, targets, request.name)
        _check_dtype(spec, targets, request.dtype)
    check_apart([target for _, targets in entries for target in targets])
    passes, seed = Passes(), _agreed(request.seed)
    generator = None if seed is None else torch.Generator().manual_seed(int(seed))
    adapters: list[Adapter] = []
    for spec, targets in entries:
        layers = {target.name: target for target in targets}
        for group, graph in spec.lay_out({target.name: target.shape for target in targets}):
            device = _device(layers[next(iter(group.members))])
            rest = (request.dtype, device, generator, request.settings, passes, layers[next(iter(group.members))].kind.inputs)
            adapters.append(make_adapter(spec, group, graph, *rest))
            if not request.is_saved:
                adapters[-1].rest_on(lambda name, own=layers: own[name].weight())  # type: ignore[misc]
    declared = [_entry(spec, targets, known) for spec, targets in entries]
    handle = Tuned(declared, adapters, [target for _, targets in entries for target in targets], passes)
    handle.seed, handle._base = seed, Snapshot(model, (Tuned, Adapter), request.also)
    _put_on(model, handle, request.name)
    return handle


def _check_asked(request: _Request) -> None:
    """Raise for arguments that no adapter can be made with."""
    settings, dtype, seed = request.settings, request.dtype, request.seed
    if request.at not in (None, "weight", "output"):
        raise AttachError(f"at={request.at!r} is neither 'weight' nor 'output'; leave it out, and the layer decides.")
    if settings.route not in (None, "apply", "delta"):
        raise AttachError(f"route={settings.route!r} is neither 'apply' nor 'delta'; leave it out for the cheaper one.")
    if settings.backend == "numpy_reference":
        raise AttachError("backend='numpy_reference' computes outside of torch, for verification; leave it out.")
    check_flag("attach", "recompute", settings.recompute)
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize < 2:
        raise AttachError(f"dtype={dtype!r} holds no trained numbers; give a floating type such as torch.float32.")
    check_seed(seed)


def _entry(spec: AdapterSpec, targets: Sequence[Target], known: Mapping[str, Place]) -> Entry:
    """A declaration with its targets, the rows of those that are blocks, and which are tables."""
    rows = {target.name: span for target in targets if (span := known[target.name].span) is not None}
    tables = frozenset(target.name for target in targets if target.is_table)
    return Entry(spec, {target.name: target.shape for target in targets}, rows, tables=tables)


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise AttachError(f"attach was given name={name!r}; a name is a word such as 'superlora'.")
    if name in dir(model):
        raise AttachError(f"the model has something named '{name}' already; detach() it, or attach under another name=.")


def _check_targets(spec: AdapterSpec, targets: Sequence[Target], name: str) -> None:
    check_alone(spec, targets, name)
    for target in targets:
        if isinstance(target.kind, Held) and spec.dropout:
            raise AttachError(
                f"dropout={spec.dropout} drops the adapter's input, which is not seen where the weight of '{target.name}' is "
                "read (nn.MultiheadAttention, at='weight'); leave dropout=0, or leave it out."
            )
        if any(is_sharded(tensor) for tensor in (target.kind.owners(target.layer) or {}).values()):
            warnings.warn(
                f"'{target.name}' is sharded already (fully_shard), so the adapter will not be: each process trains its own, "
                "and nothing averages their gradients. Attach first, then shard; or average the gradients yourself.",
                stacklevel=4,
            )
            return


def _check_dtype(spec: AdapterSpec, targets: Sequence[Target], dtype: torch.dtype) -> None:
    """Raise for a complex adapter on a real weight, which would lose imaginary parts, or with magnitudes, which are real."""
    if dtype.is_complex and spec.join is not None and spec.join.has_rows:
        raise AttachError(f"dtype={dtype} is complex, and magnitudes (DoRA) are real; give a real dtype.")
    for target in targets if dtype.is_complex else ():
        own = (target.kind.owners(target.layer) or {}).values()
        if not any(tensor.is_complex() for tensor in own):
            raise AttachError(f"dtype={dtype} is complex, and the weight of '{target.name}' is real; give a real dtype.")


def _agreed(seed: int | None) -> int | None:
    """The seed; without one, where several processes run, one that they all take."""
    distributed = torch.distributed
    if seed is not None or not (distributed.is_available() and distributed.is_initialized()):
        return seed
    if distributed.get_world_size() == 1:
        return None
    drawn = [int(torch.randint(1 << 62, ()).item())]
    device = torch.device("cuda", torch.cuda.current_device()) if distributed.get_backend() == "nccl" else None
    distributed.broadcast_object_list(drawn, src=0, device=device)
    return drawn[0]


def _device(target: Target) -> torch.device:
    """Where a target's layer computes."""
    hook = target.layer.__dict__.get("_hf_hook")
    execution = getattr(hook, "execution_device", None)
    if execution is not None:
        return torch.device(execution)
    own = [*(target.kind.owners(target.layer) or {}).values(), *target.layer.parameters(recurse=False)]
    own += target.layer.buffers(recurse=False)
    return own[0].device if own else torch.device("cpu")


def _put_on(model: nn.Module, handle: Tuned, name: str) -> None:
    """Register the handle, its hooks and what it shows; undone as a whole where any of it fails."""
    handle._model = (model, name)
    try:
        model.add_module(name, handle)
        follow(model)
        handle._base.enter()
        adapters = {id(p) for m in (handle, *model.modules()) if isinstance(m, Tuned) for p in m.parameters()}
        for own, parameter in model.named_parameters():
            if id(parameter) not in adapters:
                handle._frozen.append((own, parameter, was_trainable(parameter)))
                freeze(parameter, handle._holder)
        for parameter_name in handle._base.also:
            train(model.get_parameter(parameter_name), handle._holder)
        _hook(model, handle)
        forget_compiled()
    except BaseException:
        handle._leave()
        raise


def _hook(model: nn.Module, handle: Tuned) -> None:
    """Register the hooks of an adapter, and the weights that it shows."""
    hooks, sites = handle._hooks, list[UpdateHook]()
    held = any(isinstance(side.kind, Held) for target in handle._targets.values() for side in target.sides)
    if held or any(adapter.shares for adapter in handle._adapters()):
        hooks.append(model.register_forward_pre_hook(BeginHook(handle._passes)))
        hooks.append(model.register_forward_hook(EndHook(handle._passes), always_call=True))
    for target in handle._targets.values():
        member = handle._members[target.name]
        enlist(target, handle._model[1] if handle._model else NAME, member)
        for side in target.sides:
            if isinstance(side.kind, Held):
                show(side.layer, Block(side.kind, member))
            else:
                side.kind.ready(side.layer, member)
                sites.append(UpdateHook(side, member))
                hooks.append(side.layer.register_forward_hook(sites[-1], with_kwargs=True))
                if enters(side.kind, member):
                    hooks.append(side.layer.register_forward_pre_hook(EnterHook(sites[-1]), with_kwargs=True))
    hooks += watchers(model, sites)
    hooks += admissions(model)


def tuned(model: nn.Module, name: str = NAME) -> Tuned:
    """The handle of a model, for instance of a copy; also inside wrappers (DDP, FSDP, torch.compile).

    Raises:
        AttachError: there is none of that name, or several.
    """
    check_model(model)
    handles = {n: m for n, m in model.named_modules() if isinstance(m, Tuned)}
    direct = handles.get(name)
    if direct is not None:
        return direct
    inner = {n: m for n, m in handles.items() if n.rpartition(".")[2] == name}
    if len(inner) > 1:
        raise AttachError(f"the model carries several adapters named '{name}' ({', '.join(inner)}); ask the part you mean.")
    if not inner:
        others = f"; it carries {', '.join(map(repr, handles))}" if handles else "; attach one first"
        raise AttachError(f"the model carries no adapter named '{name}'{others}.")
    return next(iter(inner.values()))


def load(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    name: str = NAME,
    dtype: torch.dtype | None = None,
    at: At | None = None,
    route: Route | None = None,
    backend: str = DEFAULT,
    part: str | None = None,
) -> Tuned:
    """Attach a saved adapter, strictly: whatever does not fit raises and leaves the model as it was.

    Of an adapter that departs from a start (see `start`) the same half trains on.

    Args:
        model: the base the adapter was trained on.
        folder: what `save` wrote, or a folder or file of PEFT, LyCORIS, kohya, diffusers or others (see `docs/files.md`).
        name, at, route, backend: as in `attach`.
        dtype: of the parameters; None keeps the saved ones.
        part: of a file for several models (a pipeline's U-Net and text encoders), the one to take, such as ``"unet"``.

    Raises:
        CheckpointError: files missing, damaged, of a newer schema, or of another base.
    """
    check_model(model)
    saved = read_for(model, folder, part, at)
    check_base(model, folder, saved, at)
    entries = tuple((entry.trains or entry.spec, tuple(entry.targets)) for entry in saved.entries)
    # Any seed: the values are overwritten, and drawing them must not move the user's generator.
    beside = tuple(n for n, _ in model.named_parameters() if n in saved.buffers)
    kept = next(iter(saved.tensors.values())).dtype
    request = _Request(entries, name, dtype or kept, at, 0, Settings(backend, route), beside, saved.rows, True)
    handle = _attach(model, request)
    try:
        handle._realise()
        depart(handle, saved.entries, [adapter.tensors() for adapter in handle._adapters()])
        handle._take(saved, keep_dtype=dtype is not None)
    except BaseException:
        handle.detach()
        raise
    return handle
