"""The demo in its quick form: a good base, worse abroad, and better with every adapter."""

from __future__ import annotations

import json

import pytest

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from superlora_tn.demo.demo import run  # noqa: E402


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run(folder, quick=True)
    return folder, json.loads((folder / "results.json").read_text())


def test_the_base_is_good_at_home_and_clearly_worse_abroad(outcome):
    _, data = outcome
    assert data["home_accuracy"] >= 0.97
    assert data["zero_shot"] <= data["home_accuracy"] - 0.2


def test_every_variant_of_the_paper_rises_over_the_frozen_base(outcome):
    _, data = outcome
    results = {r["variant"]: r["accuracies"][0] for r in data["results"]}
    assert set(results) == {"dense", "lora", "lokr", "lotr", "lonkr", "lorta", "superlora"}
    # Ten points are far above the half point by which seeds differ (seen over three seeds).
    assert all(accuracy > data["zero_shot"] + 0.1 for accuracy in results.values()), results


def test_it_leaves_two_pictures_and_a_base_that_a_second_run_takes_up(outcome):
    folder, _ = outcome
    for picture in ("pareto.png", "network.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("*.safetensors"))) == 1
