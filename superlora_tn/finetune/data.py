"""Rows to learn from: folders of images by class, files of text, and folders or hub names of ``datasets``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from superlora_tn.declare.checks import near
from superlora_tn.finetune.config import Config
from superlora_tn.finetune.named import ConfigError, unreachable

Row = dict[str, Any]
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
SEEN = ("image-classification", "diffusion")
METADATA = ("metadata.jsonl", "metadata.csv")
LONGEST = 2**31 - 1  # characters of a cell; the csv module's own limit is a text of some pages
EVAL = ("validation", "valid", "val", "eval", "test")


@dataclass(frozen=True)
class Rows:
    """What was read.

    Attributes:
        train: rows with ``text``, or ``image`` and ``label``; for diffusion ``image``, and ``text`` or ``label`` where known.
        held: the same for evaluation; empty where there are none.
        classes: the labels of a classification, in order; empty for other tasks.
    """

    train: list[Row]
    held: list[Row]
    classes: list[str]


def read_rows(config: Config) -> Rows:
    """Read the data that a configuration names.

    Raises:
        ConfigError: a row without its column, a file that is not what its name says, or nothing at all.
    """
    train, held = _split(config, config.data)
    if config.eval_data:
        inner, other = _split(config, config.eval_data)
        held = other or inner
    elif not held and config.eval_share and config.task != "causal-lm":
        train, held = _apart(train, config)
    if not train:
        raise ConfigError(f"data '{config.data}' holds nothing to learn from.")
    classes = in_order(row["label"] for row in train) if config.task.endswith("classification") else []
    strange = next((row["label"] for row in held if classes and row["label"] not in classes), None)
    if strange is not None:
        raise ConfigError(f"the evaluation has the label '{strange}', which no training row has; {near(strange, classes)}")
    if classes and len(classes) < 2:
        raise ConfigError(f"data '{config.data}' has the one label '{classes[0]}'; classification needs two at least.")
    return Rows(train, held, classes)


def in_order(labels: Iterable[str]) -> list[str]:
    """Each label once: numbers by their size, then words."""
    return sorted(set(labels), key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))


def _apart(rows: list[Any], config: Config) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and a share that is held apart: one row at least, where two are there."""
    count = min(max(1, round(config.eval_share * len(rows))), len(rows) - 1)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
    held = set(order[:count])
    if config.task.endswith("classification"):  # what no other row shows stays, as it could not be learnt
        left = {rows[k]["label"] for k in order[count:]}
        for k in order[:count]:
            if rows[k]["label"] not in left:
                held.remove(k)
                left.add(rows[k]["label"])
    return [r for k, r in enumerate(rows) if k not in held], [r for k, r in enumerate(rows) if k in held]


def _split(config: Config, name: str) -> tuple[list[Row], list[Row]]:
    """Rows of the training split and of the first other one."""
    path = Path(name)
    if path.is_file():
        return _rows_of_file(config, path), []
    if path.is_dir() and not any((path / own).exists() for own in ("dataset_info.json", "dataset_dict.json")):
        if config.task not in SEEN:
            raise ConfigError(f"data '{name}' is no folder that datasets wrote; give a .jsonl, .csv or .txt file.")
        inner = path / "train"
        held = next((path / own for own in EVAL if (path / own).is_dir()), None) if inner.is_dir() else None
        return _seen(config, inner if inner.is_dir() else path), [] if held is None else _seen(config, held)
    import datasets

    try:
        found: Any = datasets.load_from_disk(name) if path.is_dir() else datasets.load_dataset(name)
    except (OSError, ValueError) as error:
        raise unreachable("data", name, error) from error
    if not isinstance(found, dict):
        return _of_datasets(config, name, found), []
    train = found.get("train", next(iter(found.values())))
    own = next((found[key] for key in EVAL if key in found and found[key] is not train), None)
    return _of_datasets(config, name, train), [] if own is None else _of_datasets(config, name, own)


def _seen(config: Config, folder: Path) -> list[Row]:
    """Pictures of a folder: by class, or for diffusion with captions in a metadata file or beside each, or alone."""
    if config.task != "diffusion":
        return _pictures(folder)
    note = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if note is not None:
        return [_captioned(config, folder, where, row) for where, row in _objects(note)]
    rows = []
    for file in _shown(folder):
        if file.suffix.lower() in PICTURES:
            beside = file.with_suffix(".txt")
            rows.append({"image": file} | ({"text": _read(beside).strip()} if beside.is_file() else {}))
    return rows or _pictures(folder)


def _captioned(config: Config, folder: Path, where: str, row: Any) -> Row:
    """One row of a metadata file: ``file_name``, and the columns of caption and label where they are."""
    if not isinstance(row, dict) or not row.get("file_name") or not isinstance(row["file_name"], str):
        raise ConfigError(f"{where}: a row is an object with 'file_name', and '{config.text}' or '{config.label}'.")
    if not (folder / row["file_name"]).is_file():
        raise ConfigError(f"{where}: there is no picture {folder / row['file_name']}.")
    columns = {"text": config.text, "label": config.label}
    none = {"text": (None,), "label": (None, "")}
    known = {to: str(row[column]) for to, column in columns.items() if row.get(column) not in none[to]}
    return {"image": folder / row["file_name"], **known}


def _pictures(folder: Path) -> list[Row]:
    rows = [
        {"image": file, "label": place.name}
        for place in _shown(folder)
        if place.is_dir()
        for file in _shown(place)
        if file.suffix.lower() in PICTURES
    ]
    if not rows:
        raise ConfigError(f"{folder} holds no folders of pictures, one a class: {folder}/CLASS/NAME.png.")
    return rows


def _shown(folder: Path) -> list[Path]:
    """What a folder holds, in order, but for hidden files: editors and other systems leave copies of pictures in those."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read(path: Path, newline: str | None = None) -> str:
    """A text in UTF-8, without the mark that some programs put in front of it.

    Raises:
        ConfigError: it is in another encoding.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: this is no UTF-8 ({error.reason}); save the file in that encoding.") from error


def _rows_of_file(config: Config, path: Path) -> list[Row]:
    if config.task in SEEN:
        raise ConfigError(f"data '{path}' is a file; give the folder of the pictures.")
    if path.suffix.lower() == ".txt":
        if config.task != "causal-lm":
            raise ConfigError(
                f"data '{path}' has no labels; give a .jsonl or .csv file with '{config.text}' and '{config.label}'."
            )
        return [{"text": _read(path)}]
    return [_row(config, where, row) for where, row in _objects(path)]


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row of a .csv or .jsonl file is, and its columns."""
    if path.suffix.lower() == ".csv":
        yield from _cells(path)
        return
    for k, line in enumerate(io.StringIO(_read(path)), 1):  # splitlines would also split at what JSON lets stand in a text
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{k}: this line is no JSON: {error}.") from error
            yield f"{path}:{k}", value


def _cells(path: Path) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(io.StringIO(_read(path, ""), newline=""))
    usual = csv.field_size_limit(LONGEST)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row:
                raise ConfigError(f"{where}: this row has more cells than the first has names; put text with commas in quotes.")
            yield where, row
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: this line is no CSV: {error}.") from error
    finally:
        csv.field_size_limit(usual)


def _row(config: Config, where: str, row: Any) -> Row:
    """The columns that the task needs, of one row of text."""
    columns = [config.text] if config.task == "causal-lm" else [config.text, config.label]
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a row is an object with {' and '.join(columns)}, not {str(row)[:40]}.")
    for column in columns:
        if column not in row:
            raise ConfigError(f"{where}: there is no column '{column}'; {near(column, map(str, row))}")
        if row[column] is None or (column == config.label and not str(row[column]).strip()):
            raise ConfigError(f"{where}: the column '{column}' is empty in this row; fill it, or leave the row out.")
    return {"text": str(row[config.text])} | ({"label": str(row[config.label])} if len(columns) > 1 else {})


def _of_datasets(config: Config, name: str, found: Any) -> list[Row]:
    if config.task == "diffusion":
        return _captioned_of_datasets(config, name, found)
    content = config.image if config.task == "image-classification" else config.text
    columns = [content] if config.task == "causal-lm" else [content, config.label]
    for column in columns:
        if column not in found.column_names:
            raise ConfigError(f"data '{name}' has no column '{column}'; {near(column, found.column_names)}")
    to = "image" if config.task == "image-classification" else "text"
    if len(columns) == 1:
        return [{to: row[content]} for row in found]
    named = _labels(config, found)
    return [{to: row[content], "label": named(row[config.label])} for row in found]


def _labels(config: Config, found: Any) -> Callable[[Any], str]:
    names = getattr(found.features[config.label], "names", None)
    return lambda value: str(names[value] if names else value)


def _captioned_of_datasets(config: Config, name: str, found: Any) -> list[Row]:
    """Rows for diffusion: the image, and caption and label where there are such columns."""
    if config.image not in found.column_names:
        raise ConfigError(f"data '{name}' has no column '{config.image}'; {near(config.image, found.column_names)}")
    makes: dict[str, tuple[str, Callable[[Any], Any]]] = {"image": (config.image, lambda value: value)}
    if config.text in found.column_names:
        makes["text"] = (config.text, str)
    if config.label in found.column_names:
        makes["label"] = (config.label, _labels(config, found))
    return [{to: make(row[column]) for to, (column, make) in makes.items()} for row in found]


def opened(given: Any, mode: str = "RGB") -> Any:
    """A picture in a mode of PIL's, the way up that its file says; 16 bits are scaled to 8, where PIL would cut them off.

    Args:
        given: a path, or a picture.
        mode: RGB or L.

    Raises:
        ConfigError: the file is no picture, broken, or beyond what PIL takes for harmless.
    """
    from PIL import Image

    try:
        with Image.open(given) if isinstance(given, Path) else nullcontext(given) as picture:
            return _upright(picture).convert(mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        where = given if isinstance(given, Path) else "of the data"
        raise ConfigError(f"the picture {where} cannot be read: {error}. Replace it, or leave it out.") from error


def _upright(picture: Any) -> Any:
    from PIL import Image, ImageOps

    turned = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):  # older releases of PIL say I
        return Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
    return turned


class Images(Dataset[dict[str, Any]]):
    """Pictures as a model's processor reads them, opened when they are asked for in a mode of PIL's."""

    def __init__(self, rows: Sequence[Row], classes: Sequence[str], processor: Any, mode: str = "RGB") -> None:
        self.rows, self.processor, self.mode = rows, processor, mode
        self.number = {name: k for k, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, Any]:
        row = self.rows[k]
        pixels: Tensor = self.processor(opened(row["image"], self.mode), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.number[row["label"]]}


def labelled(rows: Sequence[Row], classes: Sequence[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Texts as tokens with their labels' numbers.

    Raises:
        ConfigError: a text without a token.
    """
    number = {name: k for k, name in enumerate(classes)}
    found = []
    for row in rows:
        own = dict(tokenizer(row["text"], truncation=True, max_length=length))
        if not own["input_ids"]:
            raise ConfigError(f"the text {row['text'][:40]!r} (label '{row['label']}') has no tokens; leave that row out.")
        found.append(own | {"labels": number[row["label"]]})
    return found


def blocks(rows: Sequence[Row], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """Texts one behind another, the end's token between them, cut into rows of the same length; the rest is left out.

    Raises:
        ConfigError: there is not a single row.
    """
    tokens: list[int] = []
    for row in rows:
        tokens += tokenizer(row["text"], truncation=False, verbose=False)["input_ids"]
        tokens += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = [tokens[k : k + length] for k in range(0, len(tokens) - length + 1, length)]
    if not found:
        raise ConfigError(f"the text has {len(tokens)} tokens, which is no row of length={length}; give a smaller length.")
    return [{"input_ids": torch.tensor(own), "labels": torch.tensor(own)} for own in found]


def block_splits(rows: Rows, tokenizer: Any, config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of tokens to train on, and to evaluate."""
    train = blocks(rows.train, tokenizer, config.length)
    if rows.held:
        return train, blocks(rows.held, tokenizer, config.length)
    return _apart(train, config) if config.eval_share and len(train) > 1 else (train, [])
