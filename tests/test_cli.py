"""The command line: what a user types, reads, and is told when it is wrong."""

from __future__ import annotations

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import superlora_tn as sl
from superlora_tn import commands, make_plan, superlora
from superlora_tn.cli import EXTRAS, REFUSALS, VARIANTS, main, parser

ROOT = Path(commands.__file__).parents[1]
COMMANDS = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def strict(text: str):
    """JSON as its standard has it, without NaN and Infinity."""

    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def as_module(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "superlora_tn", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_plan_prints_the_equation_the_path_and_both_prices(capsys):
    assert main(["plan", "lokr", "--tokens", "1576"]) == 0
    text = capsys.readouterr().out
    for part in ("equation   token in1 in2, out1 in1", "path       [(", "FLOPs", "peak intermediate", "refused    delta route"):
        assert part in text


def test_plan_gives_json_that_opt_einsum_can_replay(capsys):
    assert main(["plan", "loha", "--shape", "48x32", "--json"]) == 0
    data = strict(capsys.readouterr().out)
    assert data["chosen"] in data["routes"]
    assert len(data["routes"]["apply"]["path"]) == len(data["routes"]["apply"]["steps"]) == 4


def test_plan_takes_any_network_in_index_notation(capsys):
    network = ["--network", "(o1 o2) (i1 i2)", "--node", "w1=o1 i1", "--node", "w2=o2 r", "--node", "w3=r i2", "--size", "r=8"]
    assert main(["plan", *network]) == 0
    assert "token in1 in2, out1 in1, out2 r, r in2 -> token out1 out2" in capsys.readouterr().out


@pytest.mark.parametrize("name", list(VARIANTS))
def test_every_variant_plans_and_draws(name, tmp_path, capsys):
    known = inspect.signature(VARIANTS[name]).parameters
    rank = ["--rank", "2"] if "rank" in known else ["--set", "size=4"] if "size" in known else []
    rank += ["--set", "length=16"] if "length" in known else []  # divides 32 and 48, as 4 x 4 does
    sizes = ["--shape", "32x48", "--weights", "2"]
    assert main(["plan", name, *rank, *sizes, "--draw", str(tmp_path / "tree.png")]) == 0
    assert main(["draw", name, *rank, *sizes, "--out", str(tmp_path / "net.png")]) == 0
    assert f"drawn: {tmp_path / 'net.png'}" in capsys.readouterr().out
    for picture in ("tree.png", "net.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_setting_of_several_numbers_is_a_list(capsys):
    """Ranks one a mode, and the sizes of axes, which are tuples in Python."""
    words = ["--shape", "12x10", "--weights", "1", "--json"]
    assert main(["plan", "tenslora", "--set", "rank=[1,1,2,3]", *words]) == 0
    assert json.loads(capsys.readouterr().out)["routes"]["delta"]["equation"].endswith("-> out in")
    assert main(["plan", "quan_ta", "--set", "splits=[3,4]", *words]) == 0
    assert "out1" in json.loads(capsys.readouterr().out)["terms"][0]["equation"]


def test_a_sum_is_planned_term_by_term_and_what_is_cropped_or_joined_is_told(tmp_path, capsys):
    low, crop = sl.Network("o i", {"r": 2}, B="o r", A="r i"), sl.Network("(a b) i", {"a": 8}, crop=True, C="a i", D="b i")
    (tmp_path / "sum.json").write_text(json.dumps(sl.AdapterSpec(sl.Sum(low, crop)).to_dict()))
    words = ["plan", "--spec", str(tmp_path / "sum.json"), "--join", "dora", "--shape", "30x12", "--tokens", "16"]
    assert main([*words, "--draw", str(tmp_path / "tree.png")]) == 0
    text = capsys.readouterr().out
    for part in (
        "term 1/2   out t1_r, t1_r in -> out in",
        "(out 30 of 32)",
        "crop       ",
        "whole      ",
        "join       rows scaled",
    ):
        assert part in text
    assert main([*words, "--json"]) == 0
    terms = strict(capsys.readouterr().out)["terms"]
    assert [term["crop_seconds"] > 0 for term in terms] == [False, True]
    # x through a LoRA: 2 tokens r (in + out) FLOPs; through the columns' products, dW of 32 rows is made first.
    assert terms[0]["routes"]["apply"]["flops"] == 2 * 16 * 2 * (12 + 30)
    assert terms[1]["routes"]["delta"]["steps"][0]["flops"] == 32 * 12


def test_a_join_is_planned_over_the_side_that_it_multiplies(capsys):
    for side, size in (("left", 20), ("right", 12)):
        assert main(["plan", "lora", "--rank", "2", "--join", side, "--shape", "20x12", "--tokens", "16", "--json"]) == 0
        planned = strict(capsys.readouterr().out)
        assert planned["routes"]["apply"]["flops"] == 2 * 16 * 2 * (size + size)
        assert planned["join"].startswith("W' = ")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (sl.AdapterSpec(sl.CP(2), sl.FlatFold(2), sl.Fastfood(ratio=0.5)), ["projection Fastfood("]),
        (sl.oft(4), ["join       W' = ", "maps       of nodes; "]),
        (sl.lora(2), []),
    ],
    ids=["fastfood", "oft", "lora"],
)
def test_what_no_plan_prices_is_named(spec, said, tmp_path, capsys):
    """Of a fixed map, and of maps of nodes, nothing was said."""
    declared = tmp_path / "spec.json"
    declared.write_text(json.dumps(spec.to_dict()))
    assert main(["plan", "--spec", str(declared), "--shape", "16x16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("; its own work is not in these prices")]
    assert len(lines) == len(said)
    assert all(line.startswith(words) for line, words in zip(sorted(lines), sorted(said), strict=True))


def test_a_flat_network_that_multiplies_is_priced_by_its_own_side(tmp_path, capsys):
    """The product by N (in, in) was priced as one by a matrix (out, in)."""
    prices = list[float]()
    for join, shape in ((sl.Multiply("right"), "200x10"), (None, "10x10")):
        declared = tmp_path / f"{shape}.json"
        declared.write_text(json.dumps(sl.AdapterSpec(sl.CP(2), sl.FlatFold(2), join=join).to_dict()))
        assert main(["plan", "--spec", str(declared), "--shape", shape, "--tokens", "16", "--weights", "1", "--json"]) == 0
        prices.append(strict(capsys.readouterr().out)["routes"]["delta"]["price_seconds"])
    assert prices[0] == prices[1]


def test_a_picture_goes_exactly_where_it_was_asked_for(tmp_path, capsys):
    assert main(["draw", "lora", "--out", str(tmp_path / "network"), "--json"]) == 0
    data = strict(capsys.readouterr().out)
    assert data == {"drawn": str(tmp_path / "network"), "equation": "out r, in r -> out in"}
    assert [place.name for place in tmp_path.iterdir()] == ["network"]


def test_variants_lists_each_with_its_count(capsys):
    assert main(["variants"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in VARIANTS)
    assert "294,912" in text  # LoRA: 24 weights, 8 * (768 + 768)
    assert main(["variants", "--json"]) == 0
    assert {row["variant"]: row["parameters"] for row in strict(capsys.readouterr().out)}["lora"] == 294_912


def test_variants_says_why_one_does_not_fit(capsys):
    assert main(["variants", "--shape", "97x53", "--weights", "2"]) == 0
    text = capsys.readouterr().out
    assert f"{8 * (97 + 53) * 2:,}" in text
    assert "c3a does not fit: Circulant was given size=64 for a matrix 97 x 53" in text
    assert main(["variants", "--shape", "97x53", "--json"]) == 0
    rows = {row["variant"]: row for row in strict(capsys.readouterr().out)}
    assert set(rows) == set(VARIANTS)
    assert "64" in rows["c3a"]["refused"]


def test_variants_and_suggest_take_the_kernels_of_a_files_parameters(tmp_path, capsys):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 3))
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert main(["variants", "--rank", "2", "--model", str(tmp_path / "a.safetensors"), "--json"]) == 0
    rows = {row["variant"]: row for row in strict(capsys.readouterr().out)}
    krona = 64 + 64 * 9 + 64 + 128 * 9  # channels 8 x 8 and 8 x 16, the kernel with the second
    lokr = 64 + 2 * (8 + 72) + 64 + 2 * (16 + 72)
    lonkr = 2 * 16 + 4 * 4 * 9 + 16 + 4 * 4 + 2 * (8 + 36)  # channels 4 x 4 x 4 and 4 x 4 x 8; dense where 2 is half of them
    assert {n: rows[n]["parameters"] for n in ("krona", "lokr", "lonkr")} == {"krona": krona, "lokr": lokr, "lonkr": lonkr}
    for name, spec in (("krona", sl.krona()), ("lokr", sl.lokr(2)), ("lonkr", sl.lonkr(2))):
        tuned = sl.attach(model, spec, ["0", "1"])
        assert tuned.num_parameters == rows[name]["parameters"]
        tuned.detach()
    assert main(["suggest", "700", "--model", str(tmp_path / "a.safetensors"), "--json"]) == 0
    for row in strict(capsys.readouterr().out)["found"]:
        tuned = sl.attach(model, sl.AdapterSpec.from_dict(row["spec"]), ["0", "1"])
        assert tuned.num_parameters == row["parameters"] <= 700
        tuned.detach()


def test_variants_and_suggest_take_a_models_weights(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="the demo extra is not installed")
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=8)
    config.save_pretrained(tmp_path / "config")  # its layers hold (in, out)
    shapes = {"c_attn": (96, 32), "c_proj": (32, 32)}
    arguments = ["--model", str(tmp_path / "config"), "--targets", "c_attn"]
    assert main(["variants", "--rank", "2", *arguments, "--json"]) == 0
    rows = {row["variant"]: row for row in strict(capsys.readouterr().out)}
    assert rows["lora"]["parameters"] == 2 * 2 * (96 + 32)
    assert main(["suggest", "600", *arguments, "--json"]) == 0
    found = {row["variant"]: row["parameters"] for row in strict(capsys.readouterr().out)["found"]}
    assert found["lora"] == 2 * 2 * (96 + 32)
    # Headers of a checkpoint, without a config.
    save_file(
        {f"h.{k}.{name}.weight": torch.zeros(size) for k in range(2) for name, size in shapes.items()},
        tmp_path / "a.safetensors",
    )
    assert main(["variants", "--rank", "2", "--model", str(tmp_path / "a.safetensors")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"4 weights of {tmp_path / 'a.safetensors'}, {2 * (96 * 32 + 32 * 32):,} numbers")
    assert f"{2 * 2 * (96 + 32 + 32 + 32):,}" in text
    (tmp_path / "config" / "config.json").write_text('{"model_type": "no such"}')
    for words, expected in (
        (arguments, "transformers makes no model of"),
        (["--model", str(tmp_path / "a.safetensors"), "--targets", "q"], "has no weight that could be adapted by the names q"),
        (["--model", str(tmp_path / "nothing.safetensors")], "nothing.safetensors"),
        (["--targets", "q"], "give --model too"),
        ([*arguments, "--shape", "8x8"], "--shape '8x8' says of what no model is given, and does not go with --model"),
        ([*arguments, "--weights", "3"], "--weights 3 says of what no model is given"),
    ):
        assert main(["variants", *words]) == 2
        assert expected in capsys.readouterr().err
    for text, expected in (
        ("hello", "config.json is no JSON"),
        ("[" * 100_000, "config.json is no JSON"),
        ('{"model_type": "llama", "hidden_size": "x"}', "transformers makes no model of"),
        ("[1]", "holds no safetensors file of a base model"),
    ):
        (tmp_path / "config" / "config.json").write_text(text)
        assert main(["suggest", "600", *arguments]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan"], "no variant was named; there are dense, lora"),
        (["plan", "lor"], "there is no variant 'lor'; did you mean lotr, lora or lokr?"),
        (["plan", "lora", "--set", "foo=3"], "lora has no setting 'foo'; it has rank, alpha"),
        (["plan", "lora", "--set", "foo"], "'foo' is not name=value; write for instance factor=4"),
        (["plan", "lora", "--rank", "0"], "rank=0; a rank is a whole number of at least 1"),
        (["plan", "lora", "--shape", "768"], "is not OUTxIN; write for instance 768x768"),
        (["plan", "lora", "--device", "abacus"], "no device profile 'abacus'; there are cpu"),
        (["plan", "lora", "--optimize", "foo"], "'foo' is no optimizer; give 'dp', a name of opt_einsum's"),
        (["bench", "lorta"], "lorta has a flat fold and so one route alone"),
        (["bench", "lora", "--widths", "8", "--tokens", "4", "--backend", "abacus"], "there is no backend 'abacus'"),
        (["plan", "loha", "--memory-limit", "10"], "raise the limit, plan for fewer tokens, or take the other route"),
        (["verify", "lor"], "there is no variant 'lor' to verify; did you mean lotr, lora or lokr?"),
        (["verify", "lora", "--examples", "0"], "examples is a whole number from 1"),
        (["plan", "--network", "o i", "--node", "w=o i", "--size", "r=x"], "--size r=x: 'x' is not a whole number"),
        (["plan", "--network", "o i", "--node", "B=o r", "--node", "A=r i"], "bond 'r' has no size; say --size r=8."),
        (["plan", "--network", "o i", "--node", "B=o i", "--modes", "head out in"], "needs --heads N exactly when"),
        (["plan", "--network", "((o", "--node", "w=o i"], "cannot read the modes '((o'"),
        (["plan", "--network", "o i", "--node", "sizes=o i"], "a node cannot be named 'sizes'; choose another name"),
        (["plan", "--network", "o i", "--node", "crop=o i"], "a node cannot be named 'crop'; choose another name"),
        (["plan", "superlora", "--set", "budget=1"], "below the smallest possible count"),
    ],
)
def test_a_wrong_request_is_answered_in_words_with_status_2(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "dense", "--rank", "3"], "dense has no setting 'rank'; it has alpha"),
        (["plan", "lora", "--rank", "3", "--set", "rank=4"], "'rank' is given twice, as 4 and as 3"),
        (["plan", "lora", "--node", "w=o i"], "--node ['w=o i'] goes with --network"),
        (["plan", "lora", "--modes", "out in"], "--modes 'out in' goes with --network"),
        (["draw", "lora", "--heads", "3"], "--heads 3 goes with --network"),
        (["plan", "lora", "--network", "o i", "--node", "w=o i"], "the variant 'lora' goes with a variant, not with --network"),
        (["plan", "--rank", "3", "--network", "o i", "--node", "w=o i"], "--rank 3 goes with a variant, not with --network"),
        (["plan", "--set", "a=3", "--network", "o i", "--node", "w=o i"], "--set ['a=3'] goes with a variant"),
        (["plan", "--network", "o i", "--node", "w=o i", "--node", "w=o"], "'w' is given twice, as o i and as o"),
    ],
)
def test_nothing_that_is_given_is_ignored(arguments, expected, capsys):
    assert main(arguments) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["plan", "lora", "--tokens", "0"], ["variants", "--weights", "-1"], ["bench", "--widths", "x"]]
)
def test_counts_are_whole_numbers_of_at_least_1(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert f"'{arguments[-1]}' is not a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("text", [f"{2**62 + 1}", "9" * 400, "9" * 5000])
def test_a_count_beyond_all_machines_is_refused(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "lora", "--tokens", text])
    assert stopped.value.code == 2
    assert f"'{text[:40]}' is more than 4,611,686,018,427,387,904" in capsys.readouterr().err


def test_a_declarations_file_may_have_a_mark_in_front_and_is_refused_where_it_nests_too_deep(tmp_path, capsys):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(sl.lora(2).to_dict()), encoding="utf-8-sig")
    assert main(["plan", "--spec", str(path)]) == 0
    path.write_text("[" * 100_000)
    assert main(["plan", "--spec", str(path)]) == 2
    assert "spec.json is no JSON (" in capsys.readouterr().err
    assert main(["plan", "lora", "--set", f"rank={'[' * 50_000}"]) == 2
    assert "rank='[[[" in capsys.readouterr().err


@pytest.mark.parametrize("kind", REFUSALS, ids=lambda kind: kind.__name__)
def test_what_is_refused_is_one_line_and_status_2(kind, monkeypatch, capsys):
    def refuse(args):
        raise kind("what was given,\n  and what to do")

    monkeypatch.setattr(commands, "list_variants", refuse)
    assert main(["variants"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == "superlora-tn variants: what was given, and what to do\n"


def test_a_fault_of_our_own_is_not_hidden(monkeypatch):
    monkeypatch.setattr(commands, "list_variants", lambda args: [][0])
    with pytest.raises(IndexError):
        main(["variants"])
    monkeypatch.setitem(sys.modules, "superlora_tn.verification", None)
    with pytest.raises(ModuleNotFoundError):
        main(["verify"])


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for command in (["draw", "lora", "--out"], ["plan", "lora", "--draw"]):
        assert main([*command, str(tmp_path / "file" / "network.png")]) == 2
        assert f"superlora-tn {command[0]}: {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, capsys):
    requests = {"matplotlib": ["draw", "lora"], "rich": ["demo"], "transformers": ["demo"], "hypothesis": ["verify", "lora"]}
    for package, request in requests.items():
        with monkeypatch.context() as hidden:
            for name in [n for n in sys.modules if n.split(".")[0] == package or n.startswith("superlora_tn.demo.")]:
                hidden.delitem(sys.modules, name)
            hidden.setitem(sys.modules, package, None)
            assert main(request) == 2
        assert f"pip install 'superlora_tn[{EXTRAS[package]}]'" in capsys.readouterr().err


def test_a_run_that_is_stopped_says_so(monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "demo", stop)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "superlora-tn demo: stopped\n"


VALUES = ["rank=2", "order=3", "order=5", "alpha=x", "alpha=NaN", "groups=2", "splits=9", "factor=5", "budget=90", "rank=[1]"]
VALUES += [
    "w=o i",
    "u=o r",
    "v=r i",
    "v=r i r",
    "r=4",
    "o i",
    "(o1 o2) i",
    "i (o",
    "m o i",
    "out in",
    "head out in",
    "member out in",
]
VALUES += ["", "=", "0", "-1", "2", "7", "1e9", "6x4", "1x1", "0x3", "4x", "greedy", "dp", "cuda"]
OPTIONS = [
    "--rank",
    "--set",
    "--network",
    "--node",
    "--size",
    "--modes",
    "--heads",
    "--tokens",
    "--shape",
    "--weights",
    "--device",
]
STARTS = [["plan", name] for name in (*VARIANTS, "lor")] + [["plan", "--network", "o i", "--node", "u=o r", "--node", "v=r i"]]


@given(
    st.sampled_from([*STARTS, ["variants"]]), st.lists(st.tuples(st.sampled_from(OPTIONS), st.sampled_from(VALUES)), max_size=4)
)
def test_no_request_ends_in_a_traceback(start, options):
    try:
        assert main([*start, *(word for pair in options for word in pair)]) in (0, 2)
    except SystemExit as stopped:
        assert stopped.code in (0, 2)


def test_a_budget_in_place_of_a_rank_buys_the_largest_one(capsys):
    arguments = ["plan", "superlora", "--set", "order=3", "--shape", "64x64", "--weights", "2"]
    # A core of r^3 and three factors (21, r): 594 numbers at r = 6, 784 at r = 7.
    for words, rank in ((["--set", "budget=700"], 6), (["--set", "budget=100"], 1), (["--rank", "2"], 2)):
        assert main([*arguments, *words, "--json"]) == 0
        graph = superlora(rank, order=3).lay_out({"a": (64, 64), "b": (64, 64)})[0][1]
        assert strict(capsys.readouterr().out)["routes"]["delta"]["flops"] == make_plan(graph, "delta").flops


@pytest.mark.parametrize(
    "words", [["lora", "--join", "dora"], ["oft", "--set", "size=4"], ["kradapter"], ["c3a", "--set", "size=4"]]
)
def test_bench_takes_joins_maps_and_crops(words, capsys):
    assert main(["bench", *words, "--widths", "20", "--tokens", "8", "--optimizers", "dp", "--json"]) == 0
    (row,) = strict(capsys.readouterr().out)["rows"]
    assert set(row["measured"]) == {"apply", "delta"}
    assert all(seconds > 0 for seconds in row["predicted"].values())


def test_bench_measures_each_route_beside_its_prediction(tmp_path, capsys):
    arguments = ["bench", "lora", "--rank", "2", "--widths", "16", "--tokens", "8", "--optimizers", "dp", "greedy"]
    assert main([*arguments, "--json", "--draw", str(tmp_path / "bench.png")]) == 0
    told = capsys.readouterr()
    data = strict(told.out)
    assert [row["optimizer"] for row in data["rows"]] == ["dp", "greedy"]
    assert all(set(row["measured"]) == set(row["predicted"]) == {"apply", "delta"} for row in data["rows"])
    assert data["device"]["flops"] > data["device"]["latency"] > 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "2/2: width 16, 8 tokens, greedy" in told.err


@pytest.mark.parametrize("program", ["superlora-tn", "python -m superlora_tn"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_every_word_does_by_the_name_that_was_typed(command, program, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"], program)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {program} {command} [-h]")
    assert "None" not in text
    assert all(action.help for action in COMMANDS[command]._actions)


def test_the_module_runs_as_the_command_does(capsys):
    assert main(["variants", "--json"]) == 0
    done = as_module("variants", "--json")
    assert (done.returncode, done.stdout, done.stderr) == (0, capsys.readouterr().out, "")
    assert as_module("--help").stdout.startswith("usage: python -m superlora_tn [-h] COMMAND ...\n")
    wrong = as_module("plan", "lor")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("python -m superlora_tn plan: there is no variant 'lor'; did you mean lotr, lora or lokr?")


def test_a_reader_who_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "superlora_tn", "plan", "lora", "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(timeout=120) == 0


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written_as_its_ending_says(ending, start, tmp_path):
    place = tmp_path / f"net.{ending}"
    assert main(["draw", "lora", "--out", str(place)]) == 0
    assert place.read_bytes().startswith(start)


def test_a_picture_with_another_ending_is_refused_and_not_written(tmp_path, capsys):
    assert main(["draw", "lora", "--out", str(tmp_path / "new" / "net.xyz")]) != 0
    assert "end its name in .png, .svg or .pdf" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optimizers", "optimal", "foo"], "optimize='foo' is no optimizer"),
        (["--draw", "b.txt"], "a picture cannot be written as 'b.txt'"),
        (["--backend", "fast"], "there is no backend 'fast'"),
    ],
)
def test_bench_refuses_before_it_measures(words, said, capsys):
    assert main(["bench", "lokr", "--widths", "17", "--tokens", "8", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert "measuring" not in told
    assert "1/" not in told


def test_probe_and_show_refuse_a_picture_before_they_read(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    for words in (["probe", nowhere, nowhere, "--plot", "p.txt"], ["show", nowhere, "--draw", "p.txt"]):
        assert main(words) == 2
        assert "a picture cannot be written as 'p.txt': end its name in .png" in capsys.readouterr().err
    assert main(["probe", nowhere, nowhere, "--variants", "lor"]) == 2
    assert "probe was given the variant 'lor'; did you mean" in capsys.readouterr().err


def test_more_weights_than_models_have_are_refused_before_they_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lora", "--weights", "999999999"]) == 2
    assert "--weights 999,999,999 is more than the 100,000 that are looked at" in capsys.readouterr().err
