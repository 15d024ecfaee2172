"""What do an adapter's first values do to what it learns? The settings of the converged classification on MNIST, their first
values times a number, and the best of several rates for each; one seed, on the images held apart.

The data folder is that of ``superlora-tn reproduce classification --scale converged``. Finished runs are kept in the JSON file,
and taken up; several processes, each with its own --setting, may write into files of their own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from superlora_tn_paper import converged
from superlora_tn_paper.classification_training import adapted, descend, score
from superlora_tn_paper.store import write_json
from superlora_tn_paper.task import folder_task

from superlora_tn.tools.measure import machine

RATES = (2.5e-3, 1e-2, 4e-2, 1.6e-1)  # times the number that makes first steps equal


def run(experiment: converged.Converged, setting: converged.Setting, times: float, rate: float) -> converged.Data:
    """One run at the seed that chooses rates."""
    recipe, task, seed = experiment.recipe, experiment.task, experiment.recipe.choice_seed
    head, train = experiment.head(seed), experiment.drawn(seed)
    with adapted(task, setting.spec, seed) as tuned:
        own = task.model.get_submodule(task.head)
        own.load_state_dict(head.state_dict())
        with torch.no_grad():
            for p in tuned.parameters():
                p.mul_(times)
        peak = rate * converged.rate_times(task, tuned, next(train.drawn(1, recipe.batch, seed)), recipe.stride)
        groups = [(own.parameters(), recipe.head_rate), (tuned.parameters(), peak)]
        batches = converged.epochs(train, recipe.steps, recipe.batch, seed)
        loss, _ = descend(task, groups, batches, recipe.steps, lambda *_: None)
        found = score(task, experiment.parts[1], recipe.look)
        moved = converged.moved(tuned)
    return {"accuracy": found.accuracy, "loss": found.loss, "train_loss": loss, "moved": moved, "peak rate": peak}


def main() -> None:
    """A row for each setting, multiple and rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "first_values.json")
    parser.add_argument("--setting", nargs="+", default=["LoRA r=16", "LoRTA M=3 r=8 G=1", "LoRTA M=3 r=35 G=1"])
    parser.add_argument("--times", nargs="+", type=float, default=[0.25, 1.0, 2.0, 4.0])
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    done = {(row["setting"], row["first values x"], row["rate"]) for row in rows}
    recipe = converged.ConvergedRecipe()
    with (
        tempfile.TemporaryDirectory() as folder,
        converged.opened(
            Path(folder), recipe, lambda _: folder_task(args.data, "mnist", "cpu"), Console(stderr=True)
        ) as experiment,
    ):
        every = {f"{s.variant} {s.words}": s for s in experiment.settings}
        for name in args.setting:
            for times in args.times:
                for rate in args.rates:
                    if (name, times, rate) in done:
                        continue
                    about = {"setting": name, "parameters": every[name].parameters, "first values x": times, "rate": rate}
                    rows.append(about | run(experiment, every[name], times, rate))
                    write_json(args.out, {"benchmark": "first_values", "machine": machine("cpu"), "rows": rows})
                    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
