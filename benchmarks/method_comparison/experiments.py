"""Entries for PEFT's method comparison (huggingface/peft, method_comparison/MetaMathQA), written from declarations.

``python benchmarks/method_comparison/experiments.py`` writes a folder for each under ``experiments/superlora/`` and
docs/method_comparison.md. Parameters are counted from Llama-3.2-3B's sizes on the meta device; nothing is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import Row, read
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import superlora_tn as sl
from superlora_tn.declare.parts import reference_rank
from superlora_tn.peft import SuperLoraConfig

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "method_comparison.md"
TARGETS = ("q_proj", "v_proj")  # what PEFT adapts in a Llama unless told otherwise
# Of meta-llama/Llama-3.2-3B, from its config.json.
LLAMA = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
ONE_MILLION, AS_VERA = 1_000_000, 131_072  # the second is where VeRA's and UniLoRA's entries are
# Some of PEFT's own results: from the JSON files under method_comparison/MetaMathQA/results of huggingface/peft.
PUBLISHED = (
    Row("lokr/llama-3.2-3B-rank32-factor4-lr0.003", 2_294_656, 0.46626231993934797),
    Row("fourierft/llama-3.2-3B-n_frequency-5000", 280_000, 0.1197877179681577),
    Row("lokr/llama-3.2-3B-rank32", 279_552, 0.3601213040181956),
    Row("unilora/llama-3.2-3B-r4-td131072-lr0.002", 131_072, 0.40788476118271416),
    Row("vera/llama-3.2-3B-default", 129_024, 0.3684609552691433),
    Row("tinylora/llama-3.2-3B-default", 3_584, 0.012130401819560273),
)


@dataclass(frozen=True)
class Experiment:
    """One entry.

    Attributes:
        words: its name, with a place for the rank.
        make: rank -> declaration.
        budget: the most trainable parameters.
        rate: peak learning rate of AdamW. None of ours was tried on the model: LoKr's is that of PEFT's entry with a factor of
            4, the others' a third of it.
    """

    words: str
    make: Callable[[int], sl.AdapterSpec]
    budget: int
    rate: float = 1e-3

    def spec(self, shapes: Mapping[str, tuple[int, int]]) -> sl.AdapterSpec:
        """The largest rank within the budget."""
        return sl.fit(self.make, self.budget, shapes).spec

    def name(self, shapes: Mapping[str, tuple[int, int]]) -> str:
        """The experiment's folder."""
        return "llama-3.2-3B-" + self.words.format(rank=reference_rank(self.spec(shapes).network))


EXPERIMENTS = (
    Experiment("lokr-factor8-rank{rank}", lambda rank: sl.lokr(rank, factor=8), ONE_MILLION, 3e-3),
    Experiment("lotr-rank{rank}", sl.lotr, ONE_MILLION),
    Experiment("lorta-order3-groups56-rank{rank}", lambda rank: sl.lorta(rank, 3, 56), ONE_MILLION),
    Experiment("superlora-order3-groups56-splits2-rank{rank}", lambda rank: sl.superlora(rank, 3, 56, 2), ONE_MILLION),
    Experiment("lokr-rank{rank}", sl.lokr, AS_VERA, 3e-3),
    Experiment("lotr-rank{rank}", sl.lotr, AS_VERA),
    Experiment("lorta-order3-groups1-rank{rank}", lambda rank: sl.lorta(rank, 3, 1), AS_VERA),
    Experiment("superlora-order3-groups28-splits2-rank{rank}", lambda rank: sl.superlora(rank, 3, 28, 2), AS_VERA),
)


def meta_model() -> nn.Module:
    """Llama-3.2-3B without values."""
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**LLAMA))
    return model


def target_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of q and v of every layer."""
    found = {name: module for name, module in model.named_modules() if name.endswith(TARGETS) and isinstance(module, nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in found.items()}


def config(spec: sl.AdapterSpec) -> SuperLoraConfig:
    """PEFT's configuration of a declaration."""
    return SuperLoraConfig(spec=spec, target_modules=list(TARGETS))


def write(folder: Path, experiment: Experiment, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """Write ``adapter_config.json``, and ``training_params.json`` with what differs from the defaults.

    Args:
        folder: where ``experiments/superlora/NAME`` is made.
        experiment: which.
        shapes: (out, in) of the model's q and v.

    Returns:
        The experiment's folder.
    """
    place = folder / "experiments" / "superlora" / experiment.name(shapes)
    place.mkdir(parents=True, exist_ok=True)
    config(experiment.spec(shapes)).save_pretrained(place)
    written = place / "adapter_config.json"
    kept = json.loads(written.read_text())
    kept["target_modules"] = sorted(kept["target_modules"])  # a set has no order of its own
    _dump(written, kept)
    # The default rate is 1e-4; whatever replaces the optimizer's arguments replaces all of them.
    _dump(place / "training_params.json", {"optimizer_kwargs": {"lr": experiment.rate, "weight_decay": 0.1}})
    return place


def _dump(place: Path, data: Mapping[str, Any]) -> None:
    place.write_text(json.dumps(data, indent=2) + "\n")


def rows(shapes: Mapping[str, tuple[int, int]], results: Path = HERE / "results") -> list[Row]:
    """Ours: parameters counted, and the accuracy where a result of PEFT's harness lies in `results`."""
    found = []
    for experiment in EXPERIMENTS:
        name = f"superlora/{experiment.name(shapes)}"
        place = results / f"{name.replace('/', '--')}.json"
        found.append(read(place) if place.is_file() else Row(name, experiment.spec(shapes).count(shapes), None))
    return found


def _line(row: Row, own: bool) -> str:
    accuracy = "not run" if row.accuracy is None else f"{100 * row.accuracy:.1f}"
    return f"| {'' if own else 'PEFT: '}`{row.name}` | {row.parameters:,} | {accuracy} |"


def page(own: list[Row]) -> str:
    """docs/method_comparison.md."""
    every = sorted([(row, True) for row in own] + [(row, False) for row in PUBLISHED], key=lambda one: -one[0].parameters)
    table = "\n".join(_line(row, mine) for row, mine in every)
    run = sum(row.accuracy is not None for row in own)
    state = "**None of ours has been run yet**: it needs a GPU" if run == 0 else f"{run} of them were run, on a GPU"
    return f"""# In PEFT's method comparison

[PEFT](https://github.com/huggingface/peft) compares its methods in one setting (`method_comparison/MetaMathQA`):
Llama-3.2-3B trained 5,000 steps of 4 on MetaMathQA, judged by GSM8K. Through [the plug-in](peft.md) any declaration takes
part without a line in PEFT. `benchmarks/method_comparison/experiments/superlora` holds an `adapter_config.json` and
`training_params.json` each for {len(own)} declarations below one million parameters. {state}
and the model's weights.

| experiment | trainable parameters | test accuracy % |
|---|---:|---:|
{table}

PEFT's rows are some of its published results, of June 2025 to September 2026 (and one LoKr above a million, whose
learning rate is not the default's 1e-4). Ours are counted on the meta device; the same model gives PEFT's own counts. Our
learning rates, 3e-3 for LoKr as in that entry and 1e-3 for the others, were not tried on this model.

## Run them

In a checkout of PEFT, on a machine with a GPU and the model:

```
cp -r SUPERLORA_TN/benchmarks/method_comparison/experiments/superlora method_comparison/MetaMathQA/experiments/
cd method_comparison/MetaMathQA
python SUPERLORA_TN/benchmarks/method_comparison/with_plugin.py run.py -v experiments/superlora/llama-3.2-3B-lotr-rank70
```

`with_plugin.py` imports `superlora_tn.peft` and then runs their script as it is. Results that are copied to
`benchmarks/method_comparison/results` come into this table with `python benchmarks/method_comparison/experiments.py`.

Without a GPU, `python benchmarks/method_comparison/driver.py` takes all {len(own)} through the same steps on a tiny random
Llama and sums of digits: the configuration read from its folder, `get_peft_model` on a bfloat16 base, AdamW over all
parameters with warm-up and cosine, gradient clipping, `generate` with padding on the left, the checkpoint's size, and a
result in their layout. It shows that the entries work there, and nothing about accuracy.
"""


def main() -> None:
    """Write all folders and the page."""
    shapes = target_shapes(meta_model())
    for experiment in EXPERIMENTS:
        place = write(HERE, experiment, shapes)
        print(f"{place.relative_to(HERE)}: {experiment.spec(shapes).count(shapes):,}")
    PAGE.write_text(page(rows(shapes)))


if __name__ == "__main__":
    main()
