"""PEFT's structured methods as networks: VeRA, RandLoRA, GraLoRA, MiSS, FourierFT, HiRA; C3A's circulant blocks as dW itself.

VeRA, RandLoRA, MiSS and FourierFT leave sizes to the model, so their weights are finished when these are known, HiRA with the
base's. DeLoRA and VB-LoRA are other parameters of a plain LoRA, and are read as the LoRA that they come to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.foreign import Projections
from superlora_tn.files.settings import Settings
from superlora_tn.files.single import Collected
from superlora_tn.files.weight import Weight

SHARED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "vblora_vector_bank")
# C3A's blocks grow by their length when they are written out.
MAX_DENSE = 1 << 28


def arranged(collected: Collected, settings: Settings, shared: Mapping[str, Tensor], source: str) -> Collected:
    """Tensors in the form that the tables have.

    Args:
        collected: a folder's, by weight.
        settings: its configuration.
        shared: what all weights have in common.
        source: the file, for errors.

    Raises:
        CheckpointError: tensors that are not what the method has.
    """
    fields = {name: dict(own) for name, own in collected.fields.items()}
    for name, own in fields.items():
        if settings.method == "VERA" and "vera_b" in own:
            if any(own[f].ndim != 1 for f in ("vera_b", "vera_d") if f in own):
                raise CheckpointError(f"{source}: '{name}' has VeRA's b or d with other than one axis; they are vectors.")
            own |= {"vera_A": torch.zeros(own.get("vera_d", own["vera_b"]).shape[0], 1)}
            own |= {"vera_B": torch.zeros(own["vera_b"].shape[0], own["vera_A"].shape[0])}
        if "gralora_A" in own:
            for side in ("gralora_A_general", "gralora_B_general"):
                if own.pop(side, torch.empty(0)).numel():
                    raise CheckpointError(f"{source}: '{name}' is a sum of two networks (hybrid_r); one weight has one here.")
            own |= _blocks(name, own["gralora_A"], own.get("gralora_B"), source)
        if "c3a_kernel" in own:
            own["diff"] = _circulant(name, own.pop("c3a_kernel"), source)
        if "delora_lambda" in own:
            _delora(name, own, source)
        if settings.method == "VBLORA":
            _vblora(name, own, settings.top, _found(name, shared, "vblora_vector_bank", source), source)
    return Collected(fields, collected.values)


def _blocks(name: str, a: Tensor, b: Tensor | None, source: str) -> dict[str, Tensor]:
    """GraLoRA's A (n, in, rank) and B (m, rank, out), the rank as blocks times their own ranks."""
    if b is None or a.ndim != 3 or b.ndim != 3 or not a.shape[0] or a.shape[2] % a.shape[0] or b.shape[1] % a.shape[0]:
        raise CheckpointError(f"{source}: '{name}' has no pair of GraLoRA's A (blocks, in, rank) and B (blocks, rank, out).")
    blocks = a.shape[0]
    return {
        "gralora_A": a.reshape(*a.shape[:2], blocks, a.shape[2] // blocks),
        "gralora_B": b.reshape(b.shape[0], blocks, b.shape[1] // blocks, b.shape[2]),
    }


def _circulant(name: str, kernel: Tensor, source: str) -> Tensor:
    """C3A (Chen et al. 2024): block (m, n) is ``w[m n (c - a) mod b] / in`` at row a and column c."""
    if kernel.ndim != 3 or not 0 < kernel.numel() * kernel.shape[2] <= MAX_DENSE:
        raise CheckpointError(
            f"{source}: '{name}' has a kernel of shape {tuple(kernel.shape)}; C3A's is (out, in, length) in blocks, up to "
            f"{MAX_DENSE:,} numbers of dW."
        )
    rows, columns, length = kernel.shape
    steps = torch.arange(length)
    blocks = kernel[:, :, (steps[None, :] - steps[:, None]) % length]
    return blocks.permute(0, 2, 1, 3).reshape(rows * length, columns * length) / (columns * length)


def _delora(name: str, own: dict[str, Tensor], source: str) -> None:
    """``B diag(lambda / (r |b_j| |a_j|)) A diag(w)``, w the norms of the base's columns (Bini et al. 2025), as a LoRA."""
    parts = [own.pop(f"delora_{part}", torch.empty(0)) for part in ("A", "B", "lambda", "w_norm")]
    a, b, strength, norms = (part.double() for part in parts)
    if a.ndim != 2 or b.ndim != 2 or strength.numel() != 1 or norms.shape != a.shape[1:] or b.shape[1] != a.shape[0]:
        raise CheckpointError(
            f"{source}: '{name}' has the shapes {', '.join(str(tuple(p.shape)) for p in parts)} for DeLoRA's A (rank, in), "
            "B (out, rank), lambda (1) and w_norm (in)."
        )
    sizes = a.norm(dim=1).clamp_min(1e-4) * b.norm(dim=0).clamp_min(1e-4)
    own |= {"up": (b * (strength.reshape(()) / (len(a) * sizes))).to(parts[1].dtype), "down": (a * norms).to(parts[0].dtype)}


def _vblora(name: str, own: dict[str, Tensor], top: int, bank: Tensor, source: str) -> None:
    """B and A in pieces, each the softmax mean of the `top` vectors of a common bank (Li et al. 2024), as a LoRA."""
    sides = []
    for side in "AB":
        logits = own.pop(f"vblora_logits_{side}", torch.empty(0))
        if logits.ndim != 3 or bank.ndim != 2 or logits.shape[2] != bank.shape[0] or not 0 < top <= bank.shape[0]:
            raise CheckpointError(
                f"{source}: '{name}' has logits {tuple(logits.shape)}, a bank of vectors {tuple(bank.shape)} and topk={top}; "
                "VB-LoRA's logits are of three axes, the last of all vectors (save_only_topk_weights leaves others)."
            )
        values, chosen = logits.double().topk(top, -1)
        sides.append((values.softmax(-1)[..., None] * bank.double()[chosen]).sum(-2))
    own["down"] = sides[0].flatten(1).to(bank.dtype)
    own["up"] = sides[1].transpose(1, 2).flatten(0, 1).to(bank.dtype)


def finished(weight: Weight, seed: int, shared: Mapping[str, Tensor], source: str) -> Weight:
    """A weight with what it shares with others, or with what makes it whole when a model says its size.

    Args:
        weight: as `build` made it.
        seed: of FourierFT's places.
        shared: what all weights have in common.
        source: the file, for errors.

    Raises:
        CheckpointError: what it shares is not in the file, or does not hold it.
    """
    if weight.kind == "vera":
        return _vera(weight, shared, source)
    if weight.kind == "randlora":
        return _randlora(weight, shared, source)
    if weight.kind == "fourierft":
        return _fourier(weight, seed)
    if weight.kind == "hira":
        return replace(weight, times_base=True)
    return replace(weight, late=_repeated) if weight.kind == "miss" else weight


def _fourier(weight: Weight, seed: int) -> Weight:
    """FourierFT (Gao et al. 2024): ``dW = Re ifft2(F)``, F zero but for the spectrum at places drawn from a seed; each is
    ``c_l cos(2 pi (u_l o / out + v_l i / in)) / (out in)``, where the cosine of a sum is two products."""

    def late(partial: Weight, shape: Shape, drawn: Mapping[str, Tensor]) -> Weight:
        count, (out, inward) = partial.sizes["l"], shape
        if count > out * inward or 2 * count * (out + inward) > MAX_DENSE:
            raise CheckpointError(
                f"'{partial.name}' has {count:,} frequencies for a weight {shape}; at most its numbers, and tables of "
                f"{MAX_DENSE:,} numbers, are taken."
            )
        places = torch.randperm(out * inward, generator=torch.Generator().manual_seed(seed))[:count]
        rows, columns = places // inward, places % inward
        # Whole turns are taken off as whole numbers, so that large angles lose nothing.
        left = 2 * math.pi / out * (torch.arange(out)[:, None] * rows % out).double()
        right = 2 * math.pi / inward * (torch.arange(inward) * columns[:, None] % inward).double()
        spectrum = partial.nodes["fourierft_spectrum"][1]
        dtype = torch.promote_types(spectrum.dtype, torch.float32)
        nodes = {
            "fourierft_spectrum": ("l", spectrum.to(dtype)),
            "fourierft_left": ("o l p", torch.stack([left.cos(), left.sin()], -1).to(dtype)),
            "fourierft_right": ("l p i", (torch.stack([right.cos(), -right.sin()], 1) / (out * inward)).to(dtype)),
        }
        fixed = frozenset({"fourierft_left", "fourierft_right"})
        return replace(partial, nodes=nodes, frozen=fixed, shared=fixed, late=None)

    return replace(weight, late=late)


def _vera(weight: Weight, shared: Mapping[str, Tensor], source: str) -> Weight:
    """``diag(b) B diag(d) A``, B's first rows and A's first columns; from the seed where the file has neither."""
    own = {name: weight.nodes[name] for name in ("vera_b", "vera_d")}
    rank = weight.sizes["r"]
    if shared:
        a, b = (_found(weight.name, shared, name, source) for name in ("vera_A", "vera_B"))
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[0] < weight.shape[0] or b.shape[1] != rank:
            raise CheckpointError(f"{source}: VeRA's A {tuple(a.shape)} and B {tuple(b.shape)} do not hold '{weight.name}'.")

    def late(partial: Weight, shape: Shape, drawn: Mapping[str, Tensor]) -> Weight:
        inner, outer = (shared or drawn)["vera_A"], (shared or drawn)["vera_B"]
        if inner.shape[1] < shape[1]:
            raise CheckpointError(f"'{partial.name}' reads {shape[1]} inputs in this model, but VeRA's A has {inner.shape[1]}.")
        nodes = {
            "vera_b": own["vera_b"],
            "vera_B": ("o r", outer[: partial.shape[0]]),
            "vera_d": own["vera_d"],
            "vera_A": ("r i", inner[:, : shape[1]]),
        }
        return replace(partial, nodes=nodes, late=None)

    return replace(weight, nodes=own, shared=frozenset({"vera_A", "vera_B"}), late=late)


def _randlora(weight: Weight, shared: Mapping[str, Tensor], source: str) -> Weight:
    """``sum_n B_n diag(lambda_n) A diag(gamma_n)``, A on the shorter side; PEFT runs through (n, r) in B and (r, n) in A."""
    a, b = (_found(weight.name, shared, name, source) for name in ("randlora_A", "randlora_B"))
    rank, bases, short = weight.sizes["r"], weight.sizes["n"], weight.sizes["s"]
    if a.ndim != 3 or b.ndim != 3 or a.shape[0] != rank or a.shape[1] != 1 or a.shape[2] < short or b.shape[2] != rank:
        raise CheckpointError(f"{source}: RandLoRA's A {tuple(a.shape)} and B {tuple(b.shape)} do not hold '{weight.name}'.")

    def late(partial: Weight, shape: Shape, drawn: Mapping[str, Tensor]) -> Weight:
        if short != min(shape) or b.shape[0] < max(shape) or b.shape[1] < bases:
            raise CheckpointError(
                f"'{partial.name}' is {shape} in this model, but the file's RandLoRA has {short} on the shorter side and up to "
                f"{b.shape[0]} on the longer one."
            )
        near, far = ("i", "o") if shape[1] == short else ("o", "i")
        nodes = {
            "randlora_B": (f"{far} r n", b[: max(shape), :bases].flatten(1).reshape(max(shape), rank, bases)),
            "randlora_lambda": ("r n", partial.nodes["randlora_lambda"][1]),
            "randlora_gamma": (f"n {near}", partial.nodes["randlora_gamma"][1]),
            "randlora_A": (f"r {near}", a[:, 0, :short]),
        }
        fixed = frozenset({"randlora_A", "randlora_B"})
        return replace(partial, nodes=nodes, frozen=fixed, shared=fixed, late=None)

    return replace(weight, late=late)


def _repeated(partial: Weight, shape: Shape, drawn: Mapping[str, Tensor]) -> Weight:
    """MiSS: ``dW[o (b x)] = D[x o]``, b counting the repetitions."""
    block = partial.nodes["miss_block"][1]
    if shape[1] % block.shape[0]:
        raise CheckpointError(
            f"'{partial.name}' reads {shape[1]} inputs in this model, of which MiSS' blocks of {block.shape[0]} leave a rest; "
            "that is no network."
        )
    ones = torch.ones(shape[1] // block.shape[0], dtype=block.dtype)
    nodes = {"miss_block": ("x o", block), "miss_ones": ("b", ones)}
    return replace(partial, modes="o (b x)", nodes=nodes, frozen=frozenset({"miss_ones"}), late=None)


def _found(name: str, shared: Mapping[str, Tensor], wanted: str, source: str) -> Tensor:
    if wanted not in shared:
        raise CheckpointError(f"{source} lacks {wanted}, which '{name}' needs; have PEFT save it with save_projection=True.")
    return shared[wanted]


def projections(settings: Settings) -> Projections:
    """VeRA's A and B from PEFT's seed: uniform within sqrt(6 / fan_in), A before B, both of the largest size."""

    def drawn(largest: Shape) -> dict[str, Tensor]:
        out, inward = largest
        generator = torch.Generator().manual_seed(settings.seed)
        made = {}
        for name, rows, columns in (("vera_A", settings.rank, inward), ("vera_B", out, settings.rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
            made[name] = torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        return made

    return drawn
