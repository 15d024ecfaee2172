"""An adapter in another library's format: by its own method where the format has it, else as plain LoRA."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from superlora_tn.files import formats, gguf
from superlora_tn.files.errors import CheckpointError, DiskError
from superlora_tn.files.folder import ENDINGS, check_folder, place_of
from superlora_tn.files.formats import Content, Row
from superlora_tn.files.gguf import Architecture
from superlora_tn.files.names import label
from superlora_tn.files.own import write as write_own
from superlora_tn.files.peft import CONFIG, PREFIX, TENSORS
from superlora_tn.files.peft_methods import peft_own
from superlora_tn.files.plain import Wish
from superlora_tn.files.record import Entry, marked
from superlora_tn.files.single import DIFFUSERS_METADATA
from superlora_tn.files.thin import Filled, filled
from superlora_tn.files.whole import whole

Format = Literal["superlora", "peft", "lycoris", "kohya", "diffusers", "gguf"]
FORMATS: tuple[str, ...] = get_args(Format)
# Files in a folder, where the path is one.
FILES = {
    "lycoris": "lycoris.safetensors",
    "kohya": "lora.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
    "gguf": "lora.gguf",
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OWN = "own"  # what becomes of a weight in this library's own format: nothing
ERRORS = "superlora_tn_errors"


@dataclass(frozen=True)
class Report:
    """What was written; print it.

    Attributes:
        files: the files.
        rows: what became of each weight.
    """

    files: tuple[Path, ...]
    rows: tuple[Row, ...]

    @property
    def errors(self) -> dict[str, float]:
        """Relative error of each weight's dW in the Frobenius norm, by target."""
        return {row.name: row.error for row in self.rows}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{', '.join(str(f) for f in self.files)}: {len(self.rows)} weights"]
        for row in self.rows:
            if row.method == OWN:
                lines.append(f"{row.name:{width}}  saved as it is")
                continue
            ranks = " x ".join(map(str, row.ranks)) or "-"
            lines.append(f"{row.name:{width}}  {row.method:8} rank {ranks:9} error {row.error:.2e}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Beside:
    """What an adapter changes besides its matrices.

    Attributes:
        added: full name of a parameter -> what is added to it.
        replaced: full name of a parameter or buffer -> what it becomes.
        known: full names of all of the base's parameters and buffers. They tell which modules are replaced whole, as PEFT's
            modules_to_save have to be; without them, a module whose weight is replaced counts as whole.
    """

    added: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    known: Collection[str] = ()

    def whole_modules(self, targets: Collection[str]) -> list[str]:
        """Modules of which everything is replaced, and that are no targets."""
        own = {name.rpartition(".")[0] for name in self.replaced} - set(targets) - {""}
        if not self.known:
            return sorted(module for module in own if f"{module}.weight" in self.replaced)
        return sorted(m for m in own if all(n in self.replaced for n in self.known if n.startswith(f"{m}.")))


def save_as(
    entries: Sequence[Entry],
    tensors: Mapping[str, Tensor],
    path: str | PathLike[str],
    format: Format,
    *,
    rank: int | None = None,
    error: float | None = None,
    dtype: torch.dtype | None = None,
    kernels: Mapping[str, tuple[int, ...]] | None = None,
    embeddings: Mapping[str, bool] | None = None,
    prefix: str | None = None,
    beside: Beside | None = None,
    architecture: Architecture | None = None,
) -> Report:
    """Write an adapter in a format.

    Args:
        entries: its declarations with their targets.
        tensors: the nodes, by ``group<k>.<node>``.
        path: a folder, or the file for formats of one file.
        format: "superlora", "peft", "lycoris", "kohya", "diffusers" or "gguf".
        rank: the largest rank of a plain LoRA; all weights are written so then.
        error: the largest relative error of a weight, in the Frobenius norm; likewise.
        dtype: of the numbers; None keeps them, and makes products float32 at least.
        kernels: target -> the sizes of its kernel, for convolutions.
        embeddings: targets that are embeddings' tables -> whether dW is (in, out), as torch has the table. Those that the
            declarations name as tables are (out, in).
        prefix: in front of the names: PEFT's "base_model.model.", diffusers' "transformer", LyCORIS' "lycoris", kohya's
            "lora_unet".
        beside: biases, norms and whole parameters.
        architecture: of GGUF.

    Returns:
        the files, and what became of each weight, with its relative error.

    Raises:
        CheckpointError: something that the format cannot hold, values that are not finite, or an error out of reach.
        DiskError: the disk refuses.
    """
    if format not in FORMATS:
        raise CheckpointError(f"'{format}' is no format; choose one of {', '.join(FORMATS)}.")
    if format == "peft":
        check_folder(place_of(path), "PEFT's format")
    wish, more = Wish(rank, error, dtype), beside or Beside()
    if format == "superlora":
        if wish != Wish():
            raise CheckpointError("this library's own files hold an adapter as it is; leave rank, error and dtype out.")
        _refuse(Beside(added=more.added), format)
        write_own(
            path, marked(entries, [name for name, turned in (embeddings or {}).items() if not turned]), tensors, more.replaced
        )
        return Report((place_of(path),), tuple(Row(n, OWN, (), 0.0) for e in entries for n in e.targets))
    odd = next((name for entry in entries for name in entry.targets if name in entry.rows or "+" in name), None)
    if odd is not None:
        raise CheckpointError(
            f"'{odd}' is a block of a layer's rows or a tied table, for which {format} has no name; save it as this library's "
            "own."
        )
    held = {name: whole(name, tensor, None, FLOATS) for name, tensor in tensors.items()}
    tables = {name: False for entry in entries for name in entry.tables} | dict(embeddings or {})
    weights = [
        replace(one, flipped=one.name in tables, turned=tables.get(one.name, False))
        for one in filled(entries, held, kernels or {}, joined=True)
    ]
    return save_weights(weights, path, format, wish, prefix, more, architecture or Architecture(), kept=False)


def save_weights(
    weights: Sequence[Filled],
    path: str | PathLike[str],
    format: str,
    wish: Wish,
    prefix: str | None,
    beside: Beside,
    architecture: Architecture,
    kept: bool,
) -> Report:
    """`save_as` for weights taken apart.

    Args:
        kept: whether they were read from a file of LyCORIS' kind, whose sizes are kept as they are.
    """
    place = place_of(path)
    made = content(weights, format, wish, prefix, beside, architecture, kept)
    words = {ERRORS: json.dumps({row.name: row.error for row in made.rows})}
    if format == "peft":
        targets = [one.name for one in weights]
        settings = {**made.settings, "modules_to_save": beside.whole_modules(targets) or None}
        if "bias" in settings and any(f"{target}.bias" in beside.replaced for target in targets):
            settings["bias"] = "lora_only"
        text = (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()
        files = {place / TENSORS[0]: save(_own(made.tensors), {"format": "pt", **words}), place / CONFIG: text}
    else:
        file = place if place.suffix in ENDINGS and not place.is_dir() else place / FILES[format]
        if format == "gguf":
            data = gguf.packed(replace(made, metadata={**made.metadata, **words}))
        else:
            data = save(_own(made.tensors), {"format": "pt", **made.metadata, **words})
        files = {file: data}
    for file, data in files.items():
        put(file, data)
    return Report(tuple(files), made.rows)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor as memory of its own: VeRA's slices and shared factors are views of one."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def content(
    weights: Sequence[Filled],
    format: str,
    wish: Wish,
    prefix: str | None,
    beside: Beside,
    architecture: Architecture,
    kept: bool,
) -> Content:
    """What goes into the file of a format."""
    if not weights:
        raise CheckpointError("there is no weight to write.")
    _check_joined(weights, format)
    if format == "peft":
        own = PREFIX if prefix is None else prefix
        plain = any(one.magnitude is not None for one in weights)  # PEFT has DoRA for LoRA alone
        made = (None if plain else peft_own(weights, wish, own)) or formats.lora(weights, wish, formats.peft_pair(own))
        values = _replaced(beside, own, format, [one.name for one in weights])
        return replace(made, tensors={**made.tensors, **values})
    if format == "diffusers":
        part = "transformer" if prefix is None else prefix.rstrip(".")
        own = f"{part}." if part else ""
        made = formats.lora(weights, wish, formats.peft_pair(own))
        settings = {f"{part}.{k}" if part else k: v for k, v in made.settings.items() if k not in _NO_DIFFUSERS}
        values = _replaced(beside, own, format)
        return replace(made, tensors={**made.tensors, **values}, metadata={DIFFUSERS_METADATA: json.dumps(settings)})
    if format == "gguf":
        _refuse(beside, format)
        return gguf.content(weights, wish, architecture)
    rename = underscored([one.name for one in weights], prefix or ("lycoris" if format == "lycoris" else "lora_unet"))
    if format == "kohya":
        made = formats.lora(weights, wish, formats.kohya_pair(rename), formats.kohya_held)
        words = {"ss_network_module": "networks.lora"}
    else:
        made = formats.lycoris(weights, wish, rename, kept)
        words = {"ss_network_module": "lycoris.kohya"}
    rank, alpha = made.settings.get("r", 1), made.settings.get("lora_alpha", 1.0)
    words |= {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)} if made.settings else {}
    return replace(made, tensors={**made.tensors, **_added(beside, rename, format)}, metadata=words)


def _check_joined(weights: Sequence[Filled], format: str) -> None:
    """Raise where a format has no DoRA, or not for such weights."""
    joined = [one for one in weights if one.magnitude is not None]
    if not joined:
        return
    if format not in ("peft", "kohya", "lycoris", "diffusers"):
        what = f"{format} files hold no magnitudes"
    elif format in ("peft", "diffusers") and len(joined) < len(weights):
        what = f"in {format} files either all weights have magnitudes or none"
    elif any(one.flipped for one in joined):
        what = "other libraries' DoRA of embeddings is another"
    else:
        return
    raise CheckpointError(f"'{joined[0].name}' is joined by magnitudes (DoRA), and {what}; save as 'superlora', or bake() it.")


# What diffusers hands to LoraConfig has to be its fields, without those that it sets itself.
_NO_DIFFUSERS = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "modules_to_save"}


def underscored(names: Sequence[str], prefix: str) -> Callable[[str], str]:
    """kohya's way of writing names.

    Raises:
        CheckpointError: two names become one.
    """
    made: dict[str, str] = {}
    for name in names:
        found = label(name)
        written = name if not found.dotted else f"{prefix}_{name}".replace(".", "_")
        if (other := made.setdefault(written, name)) != name:
            raise CheckpointError(f"'{other}' and '{name}' are both '{written}' in such a file; write another format.")

    def rename(name: str) -> str:
        return name if not label(name).dotted else f"{prefix}_{name}".replace(".", "_")

    return rename


def _refuse(beside: Beside, format: str) -> None:
    if names := [*beside.added, *beside.replaced]:
        raise CheckpointError(f"'{names[0]}' is no matrix with an update; {format} files hold no such values. Leave it out.")


def _replaced(beside: Beside, prefix: str, format: str, wrapped: Collection[str] = ()) -> dict[str, Tensor]:
    """Whole parameters under the prefix; PEFT wraps the layers that it adapts, so their own lie one level deeper."""
    _refuse(Beside(added=beside.added), format)
    made = {}
    for name, value in beside.replaced.items():
        module, _, kind = name.rpartition(".")
        made[f"{prefix}{module}.base_layer.{kind}" if module in wrapped else f"{prefix}{name}"] = value
    return made


def _added(beside: Beside, rename: Callable[[str], str], format: str) -> dict[str, Tensor]:
    """Biases and norms as LyCORIS writes them."""
    _refuse(Beside(replaced=beside.replaced), format)
    made = {}
    for name, value in beside.added.items():
        module, _, kind = name.rpartition(".")
        norm = f"{module}.weight" in beside.added
        made[f"{rename(module)}.{'w_norm' if kind == 'weight' else 'b_norm' if norm else 'diff_b'}"] = value
    return made


def put(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; a planted link is replaced, not followed.

    Raises:
        DiskError: the disk refuses; what was there before is still there.
    """
    draft = file.parent / f".{file.name}-{secrets.token_hex(8)}.draft"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            with open(draft, "wb", opener=lambda name, _: os.open(name, flags, 0o666)) as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            os.replace(draft, file)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(draft)
    except OSError as error:
        raise DiskError.of(error, f"cannot write {file}: {error.strerror or error}.") from error
