"""What an adapter's JSON says: declarations, the weights they adapt, and the file of their tensors, by its hash.

Schema 1 had one declaration, its tensors in ``adapter.safetensors`` and, during a save, the old ones beside it. Schema 3 is the
second, with adapters that depart from a start; all others are written in the second, which older releases read. An entry has
``rows`` and ``tables`` only where some of its targets are blocks of rows, or embeddings' tables.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from superlora_tn.declare.fold import Group, Shape
from superlora_tn.declare.parts import SpecError, reference_rank
from superlora_tn.declare.rows import Span
from superlora_tn.files.bounds import Bounds, parse, shown
from superlora_tn.files.errors import CheckpointError
from superlora_tn.network.graph import Graph, GraphNode
from superlora_tn.network.spec import AdapterSpec
from superlora_tn.network.sums import summed

SCHEMA = 3
FORMAT = "superlora_tn adapter"
FIELDS = {
    1: ("format", "schema", "spec", "targets", "tensors_sha256", "digest"),
    2: ("format", "schema", "entries", "buffers", "tensors", "tensors_sha256", "digest"),
    3: ("format", "schema", "entries", "buffers", "tensors", "tensors_sha256", "digest"),
}
FIRST_TENSORS = ("adapter.safetensors", "adapter.safetensors.previous")
FIRST_DRAFTS = ("adapter.safetensors.new", "adapter.json.new")
# Some 100,000 weights; the largest mixtures of experts have half as many.
BOUNDS = Bounds(size=8 << 20, values=300_000)
MAX_EXTENT = 1 << 48


@dataclass(frozen=True)
class Entry:
    """One declaration and the weights it adapts, name -> (out, in).

    Attributes:
        rows: of targets that are blocks of a layer, which rows they are.
        trains: where the adapter departs from a start, the declaration of the half that trains: `spec` is the sum of two of it,
            and the first block of every node is that half (see `Adapter.depart`).
        tables: targets that are embeddings' tables, (dim, num), which some formats name apart. A fact about the base, not part
            of what is declared; it is missing in files that were written before it was kept.
    """

    spec: AdapterSpec
    targets: Mapping[str, Shape]
    rows: Mapping[str, Span] = field(default_factory=dict)
    trains: AdapterSpec | None = None
    tables: Collection[str] = field(default=(), compare=False)


@dataclass(frozen=True)
class Record:
    """A JSON that is whole and undamaged; `entries` and `buffers` are as they stand there, not yet looked at.

    Attributes:
        source: what an error calls it.
        schema: of the file.
        sha256: of the tensors' file.
        entries: dicts of spec and targets.
        buffers: shapes of the base's buffers, by their full names.
    """

    source: str
    schema: int
    sha256: str
    entries: Any
    buffers: Any

    @property
    def tensors(self) -> tuple[str, ...]:
        """The file of the tensors; of schema 1, the files that may be it."""
        return FIRST_TENSORS if self.schema == 1 else (file_name(self.sha256),)


def tensor_name(group: int, node: GraphNode) -> str:
    """Under which name a node of a group is kept; groups are numbered through all entries."""
    return f"group{group}.{node.name}"


def magnitude_name(group: int) -> str:
    """Under which name the magnitudes of a group's rows are kept."""
    return f"magnitude{group}"


def names_of(group: int, spec: AdapterSpec, laid: Group, graph: Graph) -> dict[str, tuple[int, ...]]:
    """Under which names the nodes of a group are kept, and behind them its magnitudes, each with its shape."""
    found: dict[str, tuple[int, ...]] = {tensor_name(group, node): node.stored for node in graph.nodes}
    count = spec.magnitudes(laid)
    return found | ({magnitude_name(group): (count,)} if count else {})


def buffer_name(name: str) -> str:
    """Under which name a buffer of the base is kept."""
    return f"base.{name}"


def file_name(sha256: str) -> str:
    """The name of a tensors' file, from its hash."""
    return f"adapter-{sha256[:16]}.safetensors"


def digest(body: Mapping[str, Any]) -> str:
    """The hash of a JSON's fields, whatever white space they are written with."""
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def written(source: str, entries: Sequence[Entry], buffers: Mapping[str, tuple[int, ...]], sha256: str) -> bytes:
    """The JSON of an adapter.

    Raises:
        CheckpointError: it is more than would be read again.
    """
    body: dict[str, Any] = {
        "format": FORMAT,
        "schema": 3 if any(entry.trains is not None for entry in entries) else 2,
        "entries": [_written(entry) for entry in entries],
        "buffers": {name: list(shape) for name, shape in buffers.items()},
        "tensors": file_name(sha256),
        "tensors_sha256": sha256,
    }
    body["digest"] = digest(body)
    lines = json.dumps(body, indent=1) + "\n"
    # One line a target. No string holds a line break as it is, so no name can look like a shape.
    text = re.sub(r"\[\n +(\d+),\n +(\d+)\n +\]", r"[\1, \2]", lines).encode()
    entries_of(record_of(source, text))
    return text


def _written(entry: Entry) -> dict[str, Any]:
    body: dict[str, Any] = {"spec": entry.spec.to_dict(), "targets": {n: list(s) for n, s in entry.targets.items()}}
    body |= {"rows": {name: str(span) for name, span in entry.rows.items()}} if entry.rows else {}
    body |= {"tables": sorted(entry.tables)} if entry.tables else {}
    return body | ({} if entry.trains is None else {"trains": entry.trains.to_dict()})


def record_of(source: str, text: bytes) -> Record:
    """The record in a JSON text.

    Raises:
        CheckpointError: with what was found and what was expected.
    """
    body = parse(text, source, BOUNDS)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise CheckpointError(f"{source} does not say format={FORMAT!r}; it is not an adapter of this library.")
    schema = body.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise CheckpointError(f"{source} has schema={shown(schema)}; expected a whole number up to {SCHEMA}.")
    if schema > SCHEMA:
        raise CheckpointError(f"{source} has schema {schema}, this version reads up to {SCHEMA}; upgrade superlora_tn.")
    if set(body) != set(FIELDS[schema]):
        raise CheckpointError(f"{source} has the fields {shown(sorted(body))}, expected {sorted(FIELDS[schema])}.")
    if body["digest"] != digest(body):
        raise CheckpointError(f"{source} does not match its own digest; it was edited or damaged.")
    sha256 = body["tensors_sha256"]
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise CheckpointError(f"{source} has tensors_sha256={shown(sha256)}; expected 64 hexadecimal digits.")
    if schema == 1:
        return Record(source, schema, sha256, [{"spec": body["spec"], "targets": body["targets"]}], {})
    if body["tensors"] != file_name(sha256):
        raise CheckpointError(f"{source} has tensors={shown(body['tensors'])}; its hash gives '{file_name(sha256)}'.")
    return Record(source, schema, sha256, body["entries"], body["buffers"])


def owned(text: bytes) -> tuple[str, ...]:
    """All files that belong to a JSON and to no other; none where it is no adapter's."""
    try:
        record = record_of("adapter.json", text)
    except CheckpointError:
        return ()
    return (*FIRST_TENSORS, *FIRST_DRAFTS) if record.schema == 1 else record.tensors


def entries_of(record: Record) -> tuple[Entry, ...]:
    """The declarations of a record, decoded.

    Raises:
        CheckpointError: with what was found and what was expected.
    """
    given = record.entries
    known = {"spec", "targets", "rows", "tables"} | ({"trains"} if record.schema > 2 else set())
    if not isinstance(given, list) or not all(isinstance(e, dict) and {"spec", "targets"} <= set(e) <= known for e in given):
        raise CheckpointError(f"{record.source} has entries={shown(given)}; expected a list of dicts of spec and targets.")
    try:
        return tuple(_entry(one) for one in given)
    except (SpecError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{record.source}: {_cut(error)}") from error


def _entry(one: Mapping[str, Any]) -> Entry:
    spec, trains = saved_spec(one["spec"]), None
    targets, rows = _targets(one["targets"]), _rows(one.get("rows", {}), one["targets"])
    if "trains" in one:
        trains = saved_spec(one["trains"])
        if summed([trains] * 2) != spec:
            raise SpecError(f"'trains' is {trains.network}, and the sum of two of these is not the declaration {spec.network}.")
    return Entry(spec, targets, rows, trains, _tables(one.get("tables", []), targets))


def saved_spec(data: Any) -> AdapterSpec:
    """A declaration that was saved; earlier releases kept rslora=True also where it does nothing."""
    if isinstance(data, Mapping) and data.get("rslora") is True:
        plain = AdapterSpec.from_dict({**data, "rslora": False})
        return replace(plain, rslora=plain.alpha is not None and reference_rank(plain.network) is not None)
    return AdapterSpec.from_dict(data)


def buffers_of(record: Record) -> dict[str, tuple[int, ...]]:
    """The shapes of the base's buffers in a record.

    Raises:
        CheckpointError: with what was found and what was expected.
    """
    given = record.buffers
    if not isinstance(given, dict) or not all(isinstance(s, list) and _are_sizes(s, 0) for s in given.values()):
        raise CheckpointError(f"{record.source} has buffers={shown(given)}; expected a dict of name -> shape.")
    return {name: tuple(shape) for name, shape in given.items()}


def nodes_of(source: str, entries: Sequence[Entry]) -> dict[str, tuple[int, ...]]:
    """The shapes of all nodes that declarations have, by `tensor_name`.

    Raises:
        CheckpointError: a declaration does not fit its targets, or two have a target in common.
    """
    nodes: dict[str, tuple[int, ...]] = {}
    known: set[str] = set()
    groups = 0
    try:
        if not entries:
            raise SpecError("an adapter has one declaration at least.")
        for entry in entries:
            if twice := known & set(entry.targets):
                raise SpecError(f"two declarations adapt {shown(min(twice))}; each has targets of its own.")
            known |= set(entry.targets)
            laid = entry.spec.lay_out(entry.targets)
            for k, (group, graph) in enumerate(laid):
                nodes |= names_of(groups + k, entry.spec, group, graph)
            groups += len(laid)
    except (SpecError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{source}: {_cut(error)}") from error
    return nodes


def most_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The bytes of tensors of these shapes in the widest dtype."""
    return 8 * sum(math.prod(shape) for shape in shapes.values())


def _targets(data: Any) -> dict[str, Shape]:
    if not isinstance(data, dict) or not data:
        raise SpecError("targets must be a dict of name -> [out, in] with at least one entry.")
    if not all(isinstance(shape, list) and len(shape) == 2 and _are_sizes(shape, 1) for shape in data.values()):
        raise SpecError(f"targets must give [out, in] for each name, whole numbers from 1 to {MAX_EXTENT:,}.")
    return {name: (shape[0], shape[1]) for name, shape in data.items()}


def _rows(data: Any, targets: Any) -> dict[str, Span]:
    if not isinstance(data, dict) or not set(data) <= set(targets):
        raise SpecError("rows must be a dict of some of the targets -> 'start:stop/period'.")
    return {name: Span.from_text(text) for name, text in data.items()}


def _tables(data: Any, targets: Mapping[str, Shape]) -> frozenset[str]:
    if not isinstance(data, list) or not all(isinstance(name, str) and name in targets for name in data):
        raise SpecError("tables must be a list of some of the targets.")
    return frozenset(data)


def marked(entries: Sequence[Entry], tables: Collection[str]) -> tuple[Entry, ...]:
    """The declarations, those of these targets marked as embeddings' tables that they have."""
    return tuple(replace(e, tables=frozenset(e.tables) | (frozenset(tables) & e.targets.keys())) for e in entries)


def _are_sizes(numbers: Sequence[Any], least: int) -> bool:
    return all(isinstance(n, int) and not isinstance(n, bool) and least <= n <= MAX_EXTENT for n in numbers)


def _cut(error: Exception) -> str:
    """The words of an error, where a stranger's names would make them endless."""
    words = str(error)
    return words if len(words) <= 2000 else f"{words[:2000]} ..."
