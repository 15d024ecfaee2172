"""Result files in the layout of PEFT's method comparison: read, checked and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What its table of results is made of; files have more, and newer ones more again.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "run_info": ("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"),
    "train_info": (
        "accelerator_memory_reserved_avg",
        "accelerator_memory_max",
        "accelerator_memory_reserved_99th",
        "train_time",
        "file_size",
        "num_trainable_params",
        "num_total_params",
        "status",
        "metrics",
    ),
    "meta_info": ("model_info", "dataset_info", "package_info", "system_info", "pytorch_info"),
}


@dataclass(frozen=True)
class Row:
    """One experiment: its name (method/experiment), trainable parameters, and accuracy on the test set in 0..1, if run."""

    name: str
    parameters: int
    accuracy: float | None


def check(data: Mapping[str, Any], place: object) -> None:
    """Raise where a result lacks a part of the layout.

    Raises:
        ValueError: naming the parts that are missing.
    """
    missing = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys if key not in data.get(section, {})]
    if missing:
        raise ValueError(f"{place} is no result of PEFT's method comparison: it lacks {', '.join(missing)}.")


def read(place: Path) -> Row:
    """A result's row.

    Raises:
        ValueError: the file lacks a part, or its run did not end well.
    """
    data = json.loads(place.read_text())
    check(data, place)
    info = data["train_info"]
    if info["status"] != "success":
        raise ValueError(f"{place} is of a run with the status {info['status']!r}, which has no accuracy; run it again.")
    (accuracy,) = [one["test accuracy"] for one in info["metrics"] if "test accuracy" in one]
    return Row(data["run_info"]["experiment_name"], info["num_trainable_params"], accuracy)


def write(folder: Path, data: Mapping[str, Any]) -> Path:
    """Write a result as ``METHOD--EXPERIMENT.json``, the name that PEFT's table reads.

    Raises:
        ValueError: as `check`.
    """
    check(data, "this result")
    place = folder / f"{data['run_info']['experiment_name'].replace('/', '--')}.json"
    folder.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(data, indent=2) + "\n")
    return place
