"""The demo in its quick form: a good base, worse abroad, and better with every adapter."""

from __future__ import annotations

import json

import pytest

transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
pytest.importorskip("sklearn", reason="the demo extra is not installed")

from superlora_tn.demo.demo import run  # noqa: E402
from superlora_tn.demo.whole_file import whole_file  # noqa: E402


def test_a_whole_file_takes_the_old_ones_place(tmp_path):
    place = tmp_path / "lora_r=8_rho=0.5.json"  # a name with dots of its own
    for words in ("first", "second"):
        with whole_file(place) as partial:
            partial.write_text(words)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(place.name, words)]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_file_that_was_not_finished_leaves_the_old_one_and_nothing_beside_it(error, tmp_path):
    place = tmp_path / "base.safetensors"
    place.write_text("old")

    def write():
        with whole_file(place) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(place.name, "old")]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with (
        whole_file(tmp_path / "a.json") as one,
        whole_file(tmp_path / "a.json") as other,
        whole_file(tmp_path / "a.pt") as third,
    ):
        assert len({one, other, third}) == 3
        for partial in (one, other, third):
            partial.write_text(partial.name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.pt"]


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
