"""The entries for PEFT's method comparison: counts against PEFT's own, folders that it reads, results in its layout."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from optional import library

import superlora_tn as sl

library("transformers")
peft = library("peft")
library("superlora_tn.peft")

PLACE = Path(__file__).resolve().parents[1] / "benchmarks" / "method_comparison"
FOLDERS = sorted((PLACE / "experiments" / "superlora").iterdir())
BASE = 3_213_029_376 - 279_552  # PEFT's published total with LoKr, less LoKr


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts as they run, beside one another, and what PEFT itself meets with newer releases of transformers."""
    monkeypatch.syspath_prepend(str(PLACE))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`.*gradient_checkpointing.*` is deprecated")
        warnings.filterwarnings("ignore", message="Could not find a config file")
        yield


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PLACE))
        import experiments

        model = experiments.meta_model()
        assert sum(p.numel() for p in model.parameters()) == BASE
        return experiments.target_shapes(model)


@pytest.mark.parametrize(
    ("spec", "published"),
    [
        (sl.lokr(32), 279_552),
        (sl.lokr(32, factor=4), 2_294_656),
        (sl.vera(256), 129_024),
        (sl.lora(32), 9_175_040),
    ],
    ids=["lokr", "lokr, factor 4", "vera", "lora"],
)
def test_counts_are_those_of_pefts_results(spec: sl.AdapterSpec, published: int, shapes: dict[str, tuple[int, int]]) -> None:
    """`num_trainable_params` of its result files for the same model and method."""
    assert spec.count(shapes) == published


def test_the_folders_are_what_the_declarations_write(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    import experiments

    names = {experiments.write(tmp_path, one, shapes).name for one in experiments.EXPERIMENTS}
    assert names == {folder.name for folder in FOLDERS}
    assert len(names) == len(experiments.EXPERIMENTS)
    for folder in FOLDERS:
        fresh = tmp_path / "experiments" / "superlora" / folder.name
        for file in ("adapter_config.json", "training_params.json"):
            mine, written = (json.loads((place / file).read_text()) for place in (folder, fresh))
            for one in (mine, written):
                one.pop("peft_version", None)  # of whoever wrote it
            assert mine == written, folder.name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_peft_builds_an_entry_on_the_big_model_below_one_million(folder: Path) -> None:
    """On the meta device, by PEFT itself; the base keeps its own count."""
    import experiments

    model = peft.get_peft_model(experiments.meta_model(), peft.PeftConfig.from_pretrained(folder))
    trainable, total = model.get_nb_trainable_parameters()
    assert 0.1e6 < trainable < 1e6
    assert total - trainable == BASE
    assert f"| `superlora/{folder.name}` | {trainable:,} |" in experiments.PAGE.read_text()


def test_the_page_is_what_the_script_writes(shapes: dict[str, tuple[int, int]]) -> None:
    import experiments

    assert experiments.PAGE.read_text() == experiments.page(experiments.rows(shapes))


@pytest.mark.parametrize("variant", ["lotr-rank12", "lorta-order3-groups56-rank19"])
def test_an_entry_goes_through_the_harness_steps(variant: str, tmp_path: Path) -> None:
    import driver
    import results

    (folder,) = [folder for folder in FOLDERS if folder.name.endswith(variant)]
    place = driver.run(folder, tmp_path)
    assert place.name == f"superlora--{folder.name}.json"
    data, row = json.loads(place.read_text()), results.read(place)
    tiny = driver.base_model(driver.TrainConfig())
    layers = {f"model.layers.{k}.self_attn.{name}": out for k in range(2) for name, out in (("q_proj", 48), ("v_proj", 16))}
    spec = peft.PeftConfig.from_pretrained(folder).adapter_spec
    assert row.parameters == spec.count({name: (out, 48) for name, out in layers.items()})
    assert data["train_info"]["num_total_params"] - row.parameters == sum(p.numel() for p in tiny.parameters())
    # The adapter is kept in float32 on the bfloat16 base, as `autocast_adapter_dtype` asks; the rest is the file's header.
    assert 4 * row.parameters < data["train_info"]["file_size"] < 4 * row.parameters + 4096
    steps = [one["step"] for one in data["train_info"]["metrics"]]
    assert steps == [3, 6, 6]
    assert data["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": 1e-3, "weight_decay": 0.1}
    assert data["run_info"]["peft_config"]["peft_type"] == "SUPERLORA"


def test_training_moves_the_adapter_and_lowers_the_loss(tmp_path: Path) -> None:
    import driver

    (folder,) = [folder for folder in FOLDERS if folder.name.endswith("lokr-rank3")]
    place = driver.run(folder, tmp_path, max_steps=30, eval_steps=10, optimizer_kwargs={"lr": 0.1})
    losses = [one["train loss"] for one in json.loads(place.read_text())["train_info"]["metrics"]]
    # A random model starts at log(98) = 4.6 with a tied head; q and v alone can take some of it away.
    assert losses[2] < losses[0] - 0.02


def test_answers_are_read_as_the_harness_reads_them() -> None:
    import driver

    said = ["1 and 2 make 3. The answer is: 3", "The answer is: 4. The answer is: 5.\nMore", "no answer", "The answer is: 50%"]
    assert [driver.answer(text) for text in said] == ["3", "5", None, "50"]
    assert driver.accuracy(said, ["The answer is: 3", "The answer is: 4", "The answer is: 1", "The answer is: 50"]) == 0.5


def test_the_tokenizer_gives_back_what_it_was_given() -> None:
    import driver

    words = driver.tokenizer(40)
    text = "What is 3 + 4?\nThe answer is: 7"
    assert words.decode(words(text)["input_ids"]) == text
    assert words.pad_token_id == words.eos_token_id


def test_padding_but_one_end_is_left_out_of_the_loss() -> None:
    import driver

    words, config = driver.tokenizer(80), driver.TrainConfig(batch_size=2, query_template="{query}")
    rows = [{"query": "ab", "response": "c"}, {"query": "a", "response": "bcdef"}]
    (batch,) = driver.batches(words, rows, config)
    end = words.eos_token_id
    assert batch["input_ids"][0, 3:].tolist() == [end] * 3
    assert batch["labels"][0, 3:].tolist() == [end, -100, -100]
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])


def _result(**train_info: Any) -> dict[str, Any]:
    """A whole result with nothing in it but what is given."""
    import results

    empty: dict[str, Any] = {section: dict.fromkeys(keys) for section, keys in results.SECTIONS.items()}
    empty["run_info"]["experiment_name"] = "superlora/x"
    empty["train_info"] |= {"status": "success", "num_trainable_params": 5, "metrics": [{"test accuracy": 0.25}]} | train_info
    return empty


def test_results_are_written_and_read(tmp_path: Path) -> None:
    import results

    assert results.read(results.write(tmp_path, _result())) == results.Row("superlora/x", 5, 0.25)
    with pytest.raises(ValueError, match="status 'canceled'"):
        results.read(results.write(tmp_path, _result(status="canceled")))
    broken = _result()
    del broken["train_info"]["file_size"]
    with pytest.raises(ValueError, match=r"lacks train_info\.file_size"):
        results.write(tmp_path, broken)


def test_a_result_that_was_run_comes_into_the_table(shapes: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    import experiments
    import results

    name = f"superlora/{experiments.EXPERIMENTS[1].name(shapes)}"
    result = _result(num_trainable_params=991_200)
    result["run_info"]["experiment_name"] = name
    results.write(tmp_path, result)
    text = experiments.page(experiments.rows(shapes, tmp_path))
    assert f"| `{name}` | 991,200 | 25.0 |" in text
    assert "1 of them were run" in text


def test_the_plug_in_is_known_to_a_script_that_does_not_know_it(tmp_path: Path) -> None:
    """As PEFT's run.py: modules beside it, a configuration read from a folder."""
    (tmp_path / "beside.py").write_text("from peft import PeftConfig\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom beside import PeftConfig\nif __name__ == '__main__':\n"
        "    print(PeftConfig.from_pretrained(sys.argv[1]).peft_type.value)\n"
    )
    command = [sys.executable, str(PLACE / "with_plugin.py"), str(tmp_path / "run.py"), str(FOLDERS[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "SUPERLORA"
