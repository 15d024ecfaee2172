"""The real code of TensorLy, PEFT and LyCORIS as references; each is loaded when it is asked for."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata, util
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from superlora_tn.declare.fold import FlatFold, factorise
from superlora_tn.declare.parts import Dense, Hadamard, Kronecker, Network, Part, Sum, inner_parts
from superlora_tn.model.attach import attach
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.verification.cases import DTYPES, Case, NotApplicable, Sized, as_array, linear, linear_model, ratio
from superlora_tn.verification.claims.properties import forward_case
from superlora_tn.verification.references import textbook as references
from superlora_tn.verification.references.carry import Carried, Kind, kind_of, to_peft
from superlora_tn.verification.references.textbook import Array

# Name -> (module to import, distribution, extra of ours that brings it).
PACKAGES = {
    "tensorly": ("tensorly", "tensorly", ""),
    "peft": ("peft", "peft", "peft"),
    "lycoris": ("lycoris", "lycoris-lora", "bench"),
}


def is_installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return util.find_spec(PACKAGES[name][0]) is not None


def version(name: str) -> str:
    """``peft 0.21.2``."""
    return f"{name} {metadata.version(PACKAGES[name][1])}"


@cache
def load(module: str) -> Any:
    """A module of a peer, without its warnings, which are not ours to answer."""
    with quiet():
        return import_module(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence a peer: its warnings, LyCORIS's log lines on ranks that are too large, and its draws of random numbers."""
    loggers = [logging.getLogger(name) for name in ("LyCORIS", "lycoris")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


# --- TensorLy -------------------------------------------------------------------------------------------------------


def has_tensorly(spec: AdapterSpec) -> bool:
    """Whether TensorLy has functions for all parts; its `kronecker` is for matrices."""

    def known(part: Part, order: int) -> bool:
        if isinstance(part, Kronecker | Hadamard | Sum):
            return (not isinstance(part, Kronecker) or order == 2) and all(known(p, order) for p in inner_parts(part))
        return not isinstance(part, Network)

    def any_factored(part: Part) -> bool:
        if isinstance(part, Hadamard | Sum):
            return any(map(any_factored, inner_parts(part)))
        return not isinstance(part, Dense)

    order = len(spec.fold.modes.split()) if not isinstance(spec.fold, FlatFold) else spec.fold.order
    return order > 1 and known(spec.network, order) and any_factored(spec.network)


def tensorly_delta(sized: Sized) -> dict[str, Array]:
    """dW with TensorLy's `cp_to_tensor`, `tucker_to_tensor`, `tt_to_tensor` and `kronecker` in the formulas' place."""
    return references.delta(sized.spec, sized.shapes, sized.values, tensorly_formulas())


@cache
def tensorly_formulas() -> references.Formulas:
    """TensorLy's functions on TensorLy's present backend."""
    tl, cp, tucker, train = (load(f"tensorly{m}") for m in ("", ".cp_tensor", ".tucker_tensor", ".tt_tensor"))
    tenalg = load("tensorly.tenalg")

    def back(value: Any) -> Array:
        return np.asarray(tl.to_numpy(value), dtype=np.float64)

    def tensors(arrays: Sequence[Array]) -> list[Any]:
        return [tl.tensor(np.ascontiguousarray(a)) for a in arrays]

    def from_cp(factors: Sequence[Array]) -> Array:
        return back(cp.cp_to_tensor((None, tensors(factors))))

    def from_tucker(core: Array, factors: Mapping[int, Array]) -> Array:
        whole = [factors.get(k, np.eye(size)) for k, size in enumerate(core.shape)]
        return back(tucker.tucker_to_tensor((tl.tensor(core), tensors(whole))))

    def from_train(cores: Sequence[Array]) -> Array:
        if len(cores) == 1:
            return cores[0]
        return back(train.tt_to_tensor(tensors([cores[0][None], *cores[1:-1], cores[-1][..., None]])))

    def from_kronecker(parts: Sequence[Array]) -> Array:
        return back(tenalg.kronecker(tensors(parts)))

    return references.Formulas(from_cp, from_tucker, from_train, from_kronecker)


# --- PEFT -----------------------------------------------------------------------------------------------------------

RANK_SHIFT = 1e-5  # PEFT's AdaLoRA divides by the rank and this


def peft_layer(carried: Carried, base: nn.Linear) -> nn.Module:
    """PEFT's real layer around `base`, with the parameters carried over.

    Raises:
        Misfit: PEFT splits these sizes otherwise than the declaration.
        NotApplicable: PEFT would round LoHa's scale (it keeps it in float32, also for a float64 layer), take AdaLoRA's
            rank for a scale that is not positive, or keep a rank that the declaration caps.
    """
    dtype = base.weight.dtype
    if carried.is_capped:
        raise NotApplicable
    if carried.kind == "loha" and dtype == torch.float64 and float(np.float32(carried.scale)) != carried.scale:
        raise NotApplicable
    if carried.kind == "adalora" and carried.scale <= 0:
        raise NotApplicable
    tensors = {n: torch.from_numpy(np.ascontiguousarray(t)).to(dtype) for n, t in carried.tensors.items()}
    with quiet():
        layer = _made_layer(carried, base, tensors)
    # A new value's dtype is the base's own, so that a float64 case stays one.
    held = dict(layer.named_parameters())
    for name, value in tensors.items():
        suffix = ".default.weight" if carried.kind == "lora" else ".default"
        _copy(held, f"{name}{suffix}", value)
    return layer.to(dtype).eval()


def _made_layer(carried: Carried, base: nn.Linear, tensors: dict[str, Tensor]) -> nn.Module:
    """PEFT's layer with its own first values; VeRA's two shared matrices are taken out of `tensors`."""
    peft, rank, alpha = load("peft"), carried.rank, carried.alpha
    module: Any = load(f"peft.tuners.{carried.kind}.layer")
    if carried.kind == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, use_rslora=carried.rslora)
        made = module.Linear(base, "default", config, r=rank, lora_alpha=alpha)
    elif carried.kind == "adalora":
        config = peft.AdaLoraConfig(init_r=rank, total_step=1)
        made = module.SVDLinear(base, "default", config, r=rank, lora_alpha=carried.scale * (rank + RANK_SHIFT))
    elif carried.kind == "vera":
        shared = load("peft.tuners._buffer_dict").BufferDict
        a, b = (shared({"default": tensors.pop(n)}) for n in ("vera_A", "vera_B"))
        made = module.Linear(base, a, b, "default", peft.VeraConfig(r=rank), r=rank)
    elif carried.kind == "loha":
        made = module.Linear(base, "default", peft.LoHaConfig(r=rank, alpha=alpha), r=rank, alpha=alpha)
    else:
        both, factor = carried.settings["decompose_both"], carried.settings["factor"]
        config = peft.LoKrConfig(decompose_both=both, decompose_factor=factor)
        made = module.Linear(base, "default", config, r=rank, alpha=alpha)
    return made  # type: ignore[no-any-return]


def read_peft(layer: Any, adapter: str = "default") -> Carried:
    """The parameters of one of PEFT's linear layers, ready for `from_peft`.

    Args:
        layer: a LoRA, AdaLoRA, LoHa, LoKr or VeRA layer around an `nn.Linear`.
        adapter: the name of the adapter in it.

    Raises:
        Misfit: another layer, or one without that adapter.
    """
    words = type(layer).__module__.split(".")
    kind = words[2] if words[:2] == ["peft", "tuners"] and len(words) > 3 else ""
    if kind not in get_args(Kind) or adapter not in layer.r:
        raise Misfit(f"{type(layer).__name__} holds no lora, adalora, loha, lokr or vera adapter named '{adapter}'.")
    marks = (f".{adapter}", f".{adapter}.weight")
    own = {n.split(".")[0]: as_array(p) for n, p in layer.named_parameters() if n.endswith(marks) and not n.startswith("base")}
    rank, shape = layer.r[adapter], tuple(layer.get_base_layer().weight.shape)
    if kind == "vera":
        own |= {"vera_A": as_array(layer.vera_A[adapter][:, : shape[1]]), "vera_B": as_array(layer.vera_B[adapter][: shape[0]])}
        return Carried("vera", rank, float(rank), False, own)
    if kind == "adalora":
        shift = float(own.pop("ranknum")[0]) + RANK_SHIFT
        return Carried("adalora", rank, layer.scaling[adapter] / shift * rank, False, own)
    if kind == "lora":
        return Carried("lora", rank, layer.lora_alpha[adapter], layer.use_rslora[adapter], own)
    return Carried(kind, rank, layer.alpha[adapter], False, own, _settings(own, shape) if kind == "lokr" else {})  # type: ignore[arg-type]


def _settings(tensors: Mapping[str, Array], shape: tuple[int, ...]) -> dict[str, Any]:
    """A LoKr's settings, from the shape of its first split."""
    both = "lokr_w1_a" in tensors
    first = (len(tensors["lokr_w1_a"]), tensors["lokr_w1_b"].shape[1]) if both else tensors["lokr_w1"].shape
    for factor in (-1, *range(1, max(shape) + 1)):
        if tuple(factorise(size, 2, factor)[0] for size in shape) == tuple(first):
            return {"factor": factor, "decompose_both": both}
    raise Misfit(f"no factor splits {shape} so that the first split is {tuple(first)}.")


class Misfit(ValueError):
    """A peer has other parameters than the map says."""


def _copy(held: Mapping[str, Tensor], name: str, value: Tensor) -> None:
    if name not in held or held[name].shape != value.shape:
        there = {n: tuple(p.shape) for n, p in held.items()}
        raise Misfit(f"the peer has {there}, which lacks {name} of shape {tuple(value.shape)}")
    held[name].data = value


def peft_delta(sized: Sized) -> dict[str, Array]:
    """dW by PEFT's `get_delta_weight`."""
    return {t: as_array(layer.get_delta_weight("default")) for t, layer, _ in _peft_layers(sized)}


def _peft_layers(sized: Sized) -> Iterator[tuple[str, Any, nn.Linear]]:
    dtype = DTYPES[sized.case.dtype]
    model = linear_model(sized.shapes, dtype, sized.case.seed)
    for member, target in enumerate(sized.shapes):
        base = model.get_submodule(target)
        assert isinstance(base, nn.Linear)
        weight = linear(base.weight.detach().clone(), dtype)
        yield target, peft_layer(to_peft(sized.spec, sized.values, member), weight), base


def peft_forward(case: Case) -> float:
    """PEFT's layer and ours around the same `nn.Linear` give the same output."""
    return against_forward(case, lambda sized: {t: layer for t, layer, _ in _peft_layers(sized)})


def against_forward(case: Case, layers: Callable[[Sized], Mapping[str, Callable[[Tensor], Tensor]]]) -> float:
    """The error of our attached layers' outputs against a peer's around equal weights."""
    if any(size == 0 for size in case.batch):
        raise NotApplicable  # some peers refuse an empty batch, which is their business
    dtype, worst = DTYPES[case.dtype], 0.0
    for sized in case.groups():
        theirs = layers(sized)
        model = linear_model(sized.shapes, dtype, case.seed)
        handle = attach(model, case.spec, list(sized.shapes), dtype=dtype, seed=case.seed).eval()
        [own] = handle.adapters
        own.load_state_dict(sized.adapter().state_dict())
        for target in sized.shapes:
            x, _, update = forward_case(sized, target)
            layer = model.get_submodule(target)
            ours, other = (as_array(f(torch.from_numpy(x).to(dtype))) for f in (layer, theirs[target]))
            weight = np.abs(as_array(layer.weight))  # type: ignore[arg-type]
            base = np.abs(x) @ (weight + sized.magnitude()[target]).T
            worst = max(worst, ratio(ours, other, update + 2 * (x.shape[-1] + 2) * sized.unit * base))
    return worst


def has_peft(spec: AdapterSpec) -> bool:
    """Whether PEFT has this method."""
    return kind_of(spec) is not None


# --- LyCORIS --------------------------------------------------------------------------------------------------------

LYCORIS: dict[Kind, tuple[str, str]] = {
    "lora": ("locon", "LoConModule"),
    "loha": ("loha", "LohaModule"),
    "lokr": ("lokr", "LokrModule"),
}
LYCORIS_NAMES = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}


def has_lycoris(spec: AdapterSpec) -> bool:
    """Whether LyCORIS has this method."""
    return kind_of(spec) in LYCORIS


def lycoris_module(carried: Carried, base: nn.Linear, bypass: bool = False) -> Any:
    """LyCORIS's real module around `base`, with the parameters carried over.

    Raises:
        Misfit: LyCORIS splits these sizes otherwise.
        NotApplicable: it does so since it puts the smaller factor first, also where the wanted one is the larger; or it
            fixes the scale at 1 (a LoKr with both splits dense), or keeps a rank that the declaration caps.
    """
    if carried.is_capped:
        raise NotApplicable
    file, name = LYCORIS[carried.kind]
    settings = {**carried.settings, "lora_dim": carried.rank, "alpha": carried.alpha, "rs_lora": carried.rslora}
    with quiet():
        module = getattr(load(f"lycoris.modules.{file}"), name)("peer", base, 1.0, bypass_mode=bypass, **settings)
    held, dtype = dict(module.named_parameters()), base.weight.dtype
    try:
        for own, array in carried.tensors.items():
            _copy(held, LYCORIS_NAMES.get(own, own), torch.from_numpy(np.ascontiguousarray(array)).to(dtype))
    except Misfit as error:
        if carried.settings.get("factor", -1) == -1:
            raise
        raise NotApplicable from error
    if carried.kind == "lokr" and module.use_w1 and module.use_w2 and carried.alpha != carried.rank:
        raise NotApplicable
    return module.to(dtype).eval()


def read_lycoris(module: Any) -> Carried:
    """The parameters of LyCORIS's LoCon, LoHa or LoKr module of an `nn.Linear`, ready for `from_peft`.

    Raises:
        Misfit: another module, or one with a scalar, a Tucker core or weight decomposition.
    """
    kinds = {name: kind for kind, (_, name) in LYCORIS.items()}
    kind, back = kinds.get(type(module).__name__), {theirs: ours for ours, theirs in LYCORIS_NAMES.items()}
    own = {str(back.get(n, n)): as_array(p) for n, p in module.named_parameters()}
    if kind is None or not all(n.startswith(("lora_A", "lora_B", "hada_w", "lokr_w")) for n in own):
        raise Misfit(f"{type(module).__name__} with {sorted(own)} is no plain LoCon, LoHa or LoKr module.")
    settings = _settings(own, tuple(module.shape)) if kind == "lokr" else {}
    return Carried(kind, module.lora_dim, module.scale * module.lora_dim, False, own, settings)


def lycoris_delta(sized: Sized) -> dict[str, Array]:
    """dW by LyCORIS: `get_diff_weight`, which for LoKr and LoHa scales once too often; their `get_weight` scales once."""
    found = {}
    for target, module in lycoris_modules(sized).items():
        shape = sized.shapes[target]
        twice = kind_of(sized.spec) != "lora" and sized.spec.scale != 1
        found[target] = as_array(module.get_weight(shape) if twice else module.get_diff_weight(1, shape)[0])
    return found


def lycoris_modules(sized: Sized, bypass: bool = False) -> dict[str, Any]:
    """LyCORIS's modules around layers with the case's seeded weights."""
    dtype = DTYPES[sized.case.dtype]
    model = linear_model(sized.shapes, dtype, sized.case.seed)
    carried = to_peft(sized.spec, sized.values)
    made = {}
    for target in sized.shapes:
        base = model.get_submodule(target)
        assert isinstance(base, nn.Linear)
        made[target] = lycoris_module(carried, base, bypass)
    return made


def lycoris_bypass(case: Case) -> float:
    """LyCORIS's contracted forward (`bypass_mode`) and ours give the same output."""
    return against_forward(case, lambda sized: lycoris_modules(sized, bypass=True))
