"""A file's names against a model's: prefixes, '_' for '.', publishers' names, fused projections. What is not clear raises.

A name is looked for as it stands, with a known prefix taken off, with the words in front taken off one by one, and inside
each part of the model in turn; whichever holds, it has to hold for all weights of the file's part (its U-Net, a text encoder)
alike. Only then other publishers' names and fused projections are tried, through `dialects`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from superlora_tn.files.dialects import QKV, atoms
from superlora_tn.files.errors import CheckpointError

# prefix -> the part of a pipeline it stands for; "" where it stands for none. Longest first where one begins another.
PREFIXES = {
    "base_model.model.": "",
    "model.diffusion_model.": "denoiser",
    "diffusion_model.": "denoiser",
    "transformer.": "transformer",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
    "lora_unet_": "unet",
    "lora_transformer_": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_prior_unet_": "prior",
    "lora_prior_te_": "prior_text_encoder",
    "lycoris_": "",
}
# ComfyUI names its text encoders one by one, such as text_encoders.clip_l.transformer.text_model.
_ENCODER = re.compile(r"text_encoders\.(\w+)\.(?:transformer\.)?(?=.)")
# Names that a pipeline gives to the part.
CALLED = {
    "unet": ("unet", "transformer", "denoiser", "model"),
    "denoiser": ("unet", "transformer", "denoiser", "model"),
    "transformer": ("transformer", "unet"),
}
# Words that wrap a whole model and name no part of it.
WRAPPERS = {"model", "module", "text_model", "base_model", "_orig_mod"}
MAX_WORDS = 6
MAX_DEPTH = 4


@dataclass(frozen=True)
class Label:
    """A weight's name in a file, taken apart.

    Attributes:
        name: all of it.
        prefix: the known prefix it begins with, or "".
        part: which part of a pipeline that means, or "".
    """

    name: str
    prefix: str
    part: str

    @property
    def rest(self) -> str:
        """The name behind the prefix."""
        return self.name[len(self.prefix) :]

    @property
    def dotted(self) -> bool:
        """Whether it is written with the model's own dots."""
        return not self.prefix.endswith("_")


def label(name: str) -> Label:
    """Take a name apart.

    >>> label("lora_te2_text_model_encoder_layers_0_mlp_fc1").part, label("layers.0.q").part
    ('text_encoder_2', '')
    """
    if found := _ENCODER.match(name):
        return Label(name, found[0], found[1])
    prefix = next((p for p in PREFIXES if name.startswith(p) and len(name) > len(p)), "")
    return Label(name, prefix, PREFIXES.get(prefix, ""))


@dataclass(frozen=True)
class Seat:
    """Where some rows of a file's weight belong: the atom at `position` of those that make up a target."""

    target: str
    position: int
    atoms: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether it is all of the target."""
        return len(self.atoms) == 1


class _Ambiguous(CheckpointError):
    """A name that could be either of several modules."""


class _View:
    """The targets inside one module of the model, by their names in it."""

    def __init__(self, targets: Mapping[str, str]) -> None:
        self.targets = targets
        self.loose: dict[str, list[str]] = {}
        for name in targets:
            self.loose.setdefault(name.replace(".", "_"), []).append(name)

    @cached_property
    def atoms(self) -> dict[str, list[Seat]]:
        """All atoms of all targets."""
        found: dict[str, list[Seat]] = {}
        for name, target in self.targets.items():
            own = atoms(name)
            for k, atom in enumerate(own):
                found.setdefault(atom, []).append(Seat(target, k, own))
        return found

    def seats(self, name: str, dotted: bool) -> tuple[Seat, ...] | None:
        """Where a file's weight belongs, atom by atom; None where it is not here.

        Raises:
            _Ambiguous: it could be several modules.
        """
        if name in self.targets:
            return (Seat(self.targets[name], 0, (name,)),)
        alike = [] if dotted else self.loose.get(name, [])
        if len(alike) == 1:
            return (Seat(self.targets[alike[0]], 0, (name,)),)
        if alike:
            raise _Ambiguous(f"'{name}' is each of {_listed(alike)} with '_' for '.'")
        for own in (atoms(name), tuple(f"{name}.{x}".replace(".", "_") for x in QKV)):
            places = [self.atoms.get(atom, []) for atom in own]
            if all(places):
                several = next((p for p in places if len(p) > 1), None)
                if several is not None:
                    raise _Ambiguous(f"'{name}' could be each of {_listed(seat.target for seat in several)}")
                return tuple(p[0] for p in places)
        return None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{n}'" for n in sorted(set(names))[:4])


def seats(names: Sequence[str], targets: Iterable[str], source: str) -> dict[str, tuple[Seat, ...]]:
    """Where each of a file's weights belongs in a model.

    Args:
        names: of the weights, as in the file.
        targets: names of the model's weights that can be adapted.
        source: the file, for errors.

    Raises:
        CheckpointError: a name that is no module of the model, or could be several; with the nearest names.
    """
    views = _views(list(targets))
    parts: dict[str, list[Label]] = {}
    for name in names:
        found = label(name)
        parts.setdefault(found.prefix, []).append(found)
    placed: dict[str, tuple[Seat, ...]] = {}
    for group in parts.values():
        placed |= _bind(group, views, source)
    _check_once(placed, source)
    return placed


def _views(targets: list[str]) -> dict[str, _View]:
    """The whole model, then each module of it that holds targets, down to a depth."""
    inside: dict[str, dict[str, str]] = {"": {t: t for t in targets}}
    for target in targets:
        words = target.split(".")
        for depth in range(1, min(MAX_DEPTH + 1, len(words))):
            prefix = ".".join(words[:depth]) + "."
            inside.setdefault(prefix, {})[target[len(prefix) :]] = target
    return {prefix: _View(own) for prefix, own in inside.items()}


def _cuts(first: Label) -> dict[str, bool]:
    """What may have to be taken off the front of each name, and whether the rest may be looked for inside parts of the model.

    Numbers stay, they tell layers apart. Where a word of the file's is dropped, none of the model's may be as well: the
    decoder's layers are not the encoder's.
    """
    mark = "." if first.dotted else "_"
    cuts = {"": True, first.prefix: True}
    words = first.rest.split(mark)[:-1]
    for k, word in enumerate(words[:MAX_WORDS]):
        if word.isdigit():
            break
        taken = mark.join(words[: k + 1])
        cuts.setdefault(first.prefix + taken + mark, all(w in WRAPPERS for w in _wrapped(taken, mark)))
    return cuts


def _wrapped(text: str, mark: str) -> list[str]:
    return [text] if mark == "_" else text.split(".")


def _bind(group: list[Label], views: Mapping[str, _View], source: str) -> dict[str, tuple[Seat, ...]]:
    """All weights of one part, by one and the same rule."""
    for cut, inside in _cuts(group[0]).items():
        if not all(one.name.startswith(cut) and len(one.name) > len(cut) for one in group):
            continue
        found: dict[str, dict[str, tuple[Seat, ...]]] = {}
        unclear: _Ambiguous | None = None
        for prefix, view in views.items() if inside else [("", views[""])]:
            try:
                places = _all(group, cut, view)
            except _Ambiguous as error:
                unclear = unclear or error
                continue
            if places is not None:
                found[prefix] = places
        if found:
            return found[_choose(list(found), group[0], source)]
        if unclear is not None:
            raise CheckpointError(f"{source}: {unclear}; rename the weight in the file with dots.") from unclear
    raise CheckpointError(_unmatched(group, views, source))


def _all(group: list[Label], cut: str, view: _View) -> dict[str, tuple[Seat, ...]] | None:
    places: dict[str, tuple[Seat, ...]] = {}
    for one in group:
        found = view.seats(one.name[len(cut) :], one.dotted)
        if found is None:
            return None
        places[one.name] = found
    return places


def _choose(prefixes: list[str], first: Label, source: str) -> str:
    """The whole model where it fits, else the one module that does."""
    if "" in prefixes or len(prefixes) == 1:
        return "" if "" in prefixes else prefixes[0]
    # The deepest of modules inside each other hold the same targets.
    outer = [p for p in prefixes if not any(p != other and p.startswith(other) for other in prefixes)]
    called = CALLED.get(first.part, (first.part,))
    named = [p for p in outer if p.rstrip(".").rpartition(".")[2] in called]
    for chosen in (outer, named):
        if len(chosen) == 1:
            return chosen[0]
    raise CheckpointError(
        f"{source}: its weights, such as '{first.name}', fit {' and '.join(repr(p.rstrip('.')) for p in outer[:4])} of this "
        "model alike; load it on the one that is meant."
    )


def _unmatched(group: list[Label], views: Mapping[str, _View], source: str) -> str:
    """Which names found no module, by the rule that places the most."""

    def placed(cut: str, prefix: str) -> set[str]:
        found = set()
        for one in group:
            try:
                if one.name.startswith(cut) and views[prefix].seats(one.name[len(cut) :], one.dotted) is not None:
                    found.add(one.name)
            except _Ambiguous:
                continue
        return found

    # Not every pair is tried again: for an error, the whole model and the modules right in it will do.
    shallow = [p for p in views if p.count(".") <= 1][:64]
    tried = [(cut, p) for cut, inside in _cuts(group[0]).items() for p in (shallow if inside else [""])]
    best = max((placed(cut, p) for cut, p in tried), key=len, default=set())
    missing = [one.name for one in group if one.name not in best]
    targets = list(views[""].targets)
    close = difflib.get_close_matches(group[0].rest if not best else label(missing[0]).rest, targets[:20_000], 3, 0.3)
    part = f" They are of the part '{group[0].part}'; give part=... to take other parts alone." if group[0].part else ""
    return (
        f"{source}: {len(missing)} of {len(group)} weights are no module of this model, such as {_listed(missing[:3])}; "
        f"near names are {', '.join(close) or 'none'}.{part}"
    )


def _check_once(placed: Mapping[str, tuple[Seat, ...]], source: str) -> None:
    """No two weights of the file may adapt the same rows."""
    taken: dict[str, dict[int, tuple[str, Seat]]] = {}
    for name, own in placed.items():
        for seat in own:
            beside = taken.setdefault(seat.target, {})
            other = beside.get(seat.position) or next((o for o in beside.values() if seat.whole or o[1].whole), None)
            if other is not None:
                raise CheckpointError(f"{source}: '{other[0]}' and '{name}' both adapt '{seat.target}' of this model.")
            beside[seat.position] = (name, seat)
