"""The command line: what a user types, reads, and is told when it is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from superlora_tn.cli import VARIANTS, main


def test_plan_prints_the_equation_the_path_and_both_prices(capsys):
    assert main(["plan", "lokr", "--tokens", "1576"]) == 0
    text = capsys.readouterr().out
    for part in ("equation   token in1 in2, out1 in1", "path       [(", "FLOPs", "peak intermediate", "refused    delta route"):
        assert part in text


def test_plan_gives_json_that_opt_einsum_can_replay(capsys):
    assert main(["plan", "loha", "--shape", "48x32", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["chosen"] in data["routes"]
    assert len(data["routes"]["apply"]["path"]) == len(data["routes"]["apply"]["steps"]) == 4


def test_plan_takes_any_network_in_index_notation(capsys):
    network = ["--network", "(o1 o2) (i1 i2)", "--node", "w1=o1 i1", "--node", "w2=o2 r", "--node", "w3=r i2", "--size", "r=8"]
    assert main(["plan", *network]) == 0
    assert "token in1 in2, out1 in1, out2 r, r in2 -> token out1 out2" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_plans_and_draws(name, tmp_path, capsys):
    assert main(["plan", name, "--rank", "2", "--shape", "32x48", "--weights", "2", "--draw", str(tmp_path / "tree.png")]) == 0
    assert main(["draw", name, "--rank", "2", "--shape", "32x48", "--weights", "2", "--out", str(tmp_path / "net.png")]) == 0
    capsys.readouterr()
    for picture in ("tree.png", "net.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_variants_lists_each_with_its_count(capsys):
    assert main(["variants"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VARIANTS)
    assert "294,912" in text  # LoRA: 24 weights, 8 * (768 + 768)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "lor"], "there is no variant 'lor'; choose one of dense, lora"),
        (["plan", "lora", "--set", "foo=3"], "lora has no setting 'foo'; it has rank, alpha"),
        (["plan", "lora", "--rank", "0"], "rank=0; a rank is a whole number of at least 1"),
        (["plan", "lora", "--shape", "768"], "is not OUTxIN; write for instance 768x768"),
        (["plan", "lora", "--device", "abacus"], "no device profile 'abacus'; choose one of cpu"),
        (["bench", "lorta"], "lorta has a flat fold and so one route alone"),
        (["plan", "loha", "--memory-limit", "10"], "raise the limit, plan for fewer tokens, or take the other route"),
    ],
)
def test_a_wrong_request_is_answered_in_words_with_status_2(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_bench_measures_each_route_beside_its_prediction(tmp_path, capsys):
    arguments = ["bench", "lora", "--rank", "2", "--widths", "16", "--tokens", "8", "--optimizers", "dp", "greedy"]
    assert main([*arguments, "--json", "--draw", str(tmp_path / "bench.png")]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["optimizer"] for row in data["rows"]] == ["dp", "greedy"]
    assert all(set(row["measured"]) == set(row["predicted"]) == {"apply", "delta"} for row in data["rows"])
    assert data["device"]["flops"] > data["device"]["latency"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_help_of_every_command_runs():
    for command in ("demo", "variants", "plan", "bench", "verify", "draw"):
        done = subprocess.run([sys.executable, "-m", "superlora_tn.cli", command, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "usage: superlora-tn" in done.stdout
