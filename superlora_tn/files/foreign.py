"""A file of another library, parsed without a model, and fitted to a model's names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from superlora_tn.declare.fold import Shape
from superlora_tn.declare.parts import SpecError
from superlora_tn.files.errors import CheckpointError
from superlora_tn.files.fuse import assemble
from superlora_tn.files.names import Seat, label, seats
from superlora_tn.files.own import Saved
from superlora_tn.files.record import Entry, marked, names_of, tensor_name
from superlora_tn.files.weight import Weight
from superlora_tn.network.spec import AdapterSpec

Projections = Callable[[Shape], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Fitted:
    """An adapter as this library holds it.

    Attributes:
        entries: declarations, each for targets of its own.
        tensors: the nodes, by ``group<k>.<node>``, groups numbered through all entries.
        added: parameter's full name -> what is added to it (biases and norms, which are no matrices).
        replaced: parameter's full name -> its new value (PEFT's modules_to_save and biases).
        kernels: target -> the sizes of its kernel, where the file says that it is a convolution.
        embeddings: target that is an embedding's table -> whether it is held as (in, out), as torch has it.
    """

    entries: tuple[Entry, ...]
    tensors: Mapping[str, Tensor]
    added: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    embeddings: Mapping[str, bool] = field(default_factory=dict)

    @property
    def targets(self) -> dict[str, Shape]:
        """The adapted weights of all entries, name -> (out, in)."""
        return {name: shape for entry in self.entries for name, shape in entry.targets.items()}

    def saved(self, parameter: Callable[[str], Tensor]) -> Saved:
        """The same as if this library had saved it: biases and norms as the values they become.

        Args:
            parameter: gives a parameter of the base by its full name.

        Raises:
            CheckpointError: a value of another shape than the parameter's.
        """
        values = dict(self.replaced)
        for name, value in (*self.added.items(), *self.replaced.items()):
            base = parameter(name).detach()
            if base.shape != value.shape:
                raise CheckpointError(f"'{name}' is {tuple(base.shape)} in this base and {tuple(value.shape)} in the file.")
            if name in self.added:
                values[name] = (base.cpu().double() + value.double()).to(base.dtype)
        return Saved(self.entries, self.tensors, values)


@dataclass(frozen=True, eq=False)
class Parsed:
    """What a file of another library holds.

    Attributes:
        path: the file or folder.
        origin: who writes such files: peft, kohya, lycoris, diffusers, comfyui, xlabs, onetrainer, ai-toolkit or gguf.
        bytes: the size of its tensors' file.
        weights: one for each adapted weight.
        added: ``<module>.weight`` or ``<module>.bias``, module named as in the file -> what is added.
        replaced: the same -> what it becomes.
        metadata: strings that stand in the file.
        projections: draws VeRA's A and B, where the file leaves them to a seed, from the largest (out, in).
    """

    path: Path
    origin: str
    bytes: int
    weights: tuple[Weight, ...]
    added: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    projections: Projections | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a pipeline that the file adapts, by its prefixes; "" where they name none."""
        return tuple(dict.fromkeys(label(w.name).part for w in self.weights))

    @property
    def architecture(self) -> str:
        """GGUF's, whose names its weights have; "" for names that a model has."""
        own = self.metadata.get("general.architecture", "unknown") if self.origin == "gguf" else "unknown"
        named = any(w.name.startswith("blk.") or w.name in ("token_embd", "output") for w in self.weights)
        return own if named and own != "unknown" else ""

    def check_names(self) -> None:
        """Raise `CheckpointError` where the names are no model's, and rows may be in another order."""
        if self.architecture:
            raise CheckpointError(
                f"{self.path}: names such as '{self.weights[0].name}' are those of GGUF's architecture '{self.architecture}', "
                "so the modules are known only with the base model; give it."
            )

    def only(self, part: str) -> Parsed:
        """The weights of one part alone, such as ``"unet"``.

        Raises:
            CheckpointError: the file has no such part.
        """
        if part not in self.parts:
            raise CheckpointError(f"{self.path} has no part {part!r}; it has {', '.join(map(repr, self.parts))}.")
        return replace(
            self,
            weights=tuple(w for w in self.weights if label(w.name).part == part),
            added={n: t for n, t in self.added.items() if label(n).part == part},
            replaced={n: t for n, t in self.replaced.items() if label(n).part == part},
        )

    def fitted(
        self,
        shapes: Mapping[str, Shape],
        *,
        parameters: Iterable[str] = (),
        weights: Callable[[str], Tensor] | None = None,
        part: str | None = None,
        joined: bool = False,
        stored: bool = False,
    ) -> Fitted:
        """The adapter for a model.

        Args:
            shapes: of all weights of the model that can be adapted, (out, in), by module name.
            parameters: full names of all parameters and buffers of the model; needed where the file holds biases, norms or
                whole modules.
            weights: gives the base weight (out, in) of a target; needed for DoRA and HiRA.
            part: take the weights of one part of the file alone, see `only`.
            joined: DoRA's norms of rows become magnitudes that train (`sl.dora`); else dW is what they make of the base.
            stored: shapes and weights are those of a checkpoint, where an embedding's table is (num, dim); it is adapted as
                (dim, num).

        Raises:
            CheckpointError: whatever of the file does not fit, is not clear, or would be left over.
        """
        if part is not None:
            more: Any = {"parameters": parameters, "weights": weights, "joined": joined, "stored": stored}
            return self.only(part).fitted(shapes, **more)
        source = str(self.path)
        placed = seats([w.name for w in self.weights], shapes, source)
        tables = {seat.target for w in self.weights if stored and w.flipped for seat in placed[w.name]}
        shapes = {name: shape[::-1] if name in tables else shape for name, shape in shapes.items()}
        whole = self._complete(placed, shapes)
        made = assemble(whole, placed, shapes, source)
        if joined:
            made = {target: weight.joined() for target, weight in made.items()}
        made = {target: self._on_base(weight, target, weights, target in tables) for target, weight in made.items()}
        places = self._places(placed, shapes, parameters)
        return _fitted(made, _moved(self.added, places), _moved(self.replaced, places), source)

    def _complete(self, placed: Mapping[str, tuple[Seat, ...]], shapes: Mapping[str, Shape]) -> dict[str, Weight]:
        """The weights by name, those finished that a file alone does not tell."""
        late = {w.name: w.late for w in self.weights if w.late is not None}
        if not late:
            return {w.name: w for w in self.weights}
        for name in late:
            if len(placed[name]) > 1 or not placed[name][0].whole:
                raise CheckpointError(
                    f"{self.path}: '{name}' follows from the size of one weight, but this model has it in parts, such as "
                    f"'{placed[name][0].target}'."
                )
        sizes = {name: shapes[placed[name][0].target] for name in late}
        drawn: Mapping[str, Tensor] = {}
        if self.projections is not None:
            drawn = self.projections((max(out for out, _ in sizes.values()), max(inward for _, inward in sizes.values())))
        return {w.name: w if w.late is None else w.late(w, sizes[w.name], drawn) for w in self.weights}

    def _on_base(self, weight: Weight, target: str, weights: Callable[[str], Tensor] | None, turned: bool) -> Weight:
        if not weight.rests:
            return weight
        if weights is None:
            kind = "HiRA" if weight.times_base else "DoRA"
            raise CheckpointError(
                f"{self.path}: '{target}' is a {kind}, whose update follows from the base weight; give the base weights."
            )
        return weight.with_base(weights(target).T if turned else weights(target))

    def _places(
        self, placed: Mapping[str, tuple[Seat, ...]], shapes: Mapping[str, Shape], parameters: Iterable[str]
    ) -> dict[str, str]:
        """Where the biases, norms and whole modules of the file are in the model, by full names."""
        names = [*self.added, *self.replaced]
        if not names:
            return {}
        known = set(parameters)
        if not known:
            raise CheckpointError(
                f"{self.path} also holds values of {len(names)} parameters such as '{names[0]}'; give the model's parameters' "
                "names, or load it on the model."
            )
        modules = {p.rpartition(".")[0] for p in known} | set(shapes)
        found = seats(list(dict.fromkeys(n.rpartition(".")[0] for n in names)), modules, str(self.path))
        places = {}
        for name in names:
            module, _, kind = name.rpartition(".")
            place = placed.get(module) or found[module]
            full = f"{place[0].target}.{kind}"
            if len(place) > 1 or not place[0].whole or full not in known:
                raise CheckpointError(f"{self.path}: '{name}' is no parameter of this model ('{full}' is looked for).")
            places[name] = full
        return places

    def plain(self) -> Fitted:
        """The adapter under the names that stand in the file, for a model that has just these.

        Raises:
            CheckpointError: the names have '_' for '.', or something in the file is only known with a model.
        """
        self.check_names()
        for weight in self.weights:
            if not label(weight.name).dotted:
                raise CheckpointError(
                    f"{self.path}: names such as '{weight.name}' have '_' for '.', so the modules are known only with the "
                    "base model; give it."
                )
            if weight.late is not None or weight.rests:
                raise CheckpointError(
                    f"{self.path}: {weight.kind} of '{weight.name}' is only known with the base model; give it."
                )
        if len(self.parts) > 1 and self.origin != "gguf":
            raise CheckpointError(f"{self.path} adapts the parts {', '.join(map(repr, self.parts))}; choose one.")
        # In GGUF, a name that begins with "transformer." is the model's own.
        names = {w.name: w.name if self.origin == "gguf" else label(w.name).rest for w in self.weights}
        made = {names[w.name]: w for w in self.weights}
        added, replaced = ({label(n).rest: t for n, t in own.items()} for own in (self.added, self.replaced))
        return _fitted(made, added, replaced, str(self.path))


def _fitted(made: Mapping[str, Weight], added: Mapping[str, Tensor], replaced: Mapping[str, Tensor], source: str) -> Fitted:
    entries, tensors = gather(made, source)
    kernels = {name: weight.kernel for name, weight in made.items() if weight.kernel}
    embeddings = {name: weight.turned for name, weight in made.items() if weight.flipped}
    return Fitted(entries, tensors, added, replaced, kernels, embeddings)


def _moved(values: Mapping[str, Tensor], places: Mapping[str, str]) -> dict[str, Tensor]:
    return {places[name]: value for name, value in values.items()}


def gather(made: Mapping[str, Weight], source: str) -> tuple[tuple[Entry, ...], dict[str, Tensor]]:
    """Declarations and nodes of weights by the names of their targets: one entry for each declaration.

    Raises:
        CheckpointError: a network that cannot be declared.
    """
    apart: dict[AdapterSpec, dict[str, Shape]] = {}
    tensors: dict[str, Tensor] = {}
    entries: list[Entry] = []
    try:
        for target, weight in made.items():
            apart.setdefault(weight.spec, {})[target] = weight.shape
        k = 0
        for spec, targets in apart.items():
            entries.append(Entry(spec, targets))
            for group, graph in spec.lay_out(targets):
                members = [made[name] for name in group.members]
                for node in graph.nodes:
                    tensors[tensor_name(k, node)] = _node(node.name, members)
                norms = [m.magnitude.flatten() for m in members if m.joins and m.magnitude is not None]
                own = names_of(k, spec, group, graph).keys() - {tensor_name(k, node) for node in graph.nodes}
                tensors |= {name: torch.cat(norms) for name in own}
                k += 1
    except SpecError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return marked(entries, [name for name, weight in made.items() if weight.flipped and not weight.turned]), tensors


def _node(name: str, members: list[Weight]) -> Tensor:
    first = members[0]
    values = [m.nodes[name][1] for m in members]
    if not first.shared:
        return values[0]
    return values[0] if name in first.shared else torch.stack(values)
