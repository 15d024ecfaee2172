"""README and docs: their Python runs, their commands print what they show, their links and figures hold."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from shown import BLOCK, PAGES, ROOT, Shown, again, run, shown

from superlora_tn.cli import parser
from superlora_tn.finetune.config import keys

EXAMPLES = [(page, example) for page in PAGES for example in shown(page)]


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_python_examples_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict = {"__name__": "example"}
    for text in blocks(page):
        exec(compile(text, f"{page.name} example", "exec", dont_inherit=True), scope)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text()):
        link = target[0] or target[1]
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} points at {link}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_named_exist(page):
    commands = next(a for a in parser()._actions if a.dest == "command").choices
    for command in re.findall(r"superlora-tn ([a-z]+)", page.read_text()):
        assert command in commands, f"{page.name} names the command '{command}'"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", page.read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page.name} names 'make {target}'"


@pytest.mark.parametrize(("page", "example"), EXAMPLES, ids=lambda given: getattr(given, "words", None) or given.name)
def test_a_command_prints_what_is_shown(page, example):
    if example.words.startswith("verify "):
        pytest.importorskip("hypothesis", reason="the verify extra is not installed")
    printed = run(example.words)
    assert example.holds(printed), f"{page.name} shows for '{example.words}'\n{example.printed}\nit prints\n{printed}"


def test_the_page_of_finetune_lists_every_key_with_its_default():
    lines = [line for line in (ROOT / "docs" / "finetune.md").read_text().splitlines() if line.startswith("| `")]
    assert lines[-len(keys()) :] == [f"| `{name}` | {f'`{usual}`' * bool(usual)} | {words} |" for name, usual, words in keys()]


def test_the_pages_show_a_plan_a_list_and_a_certificate():
    assert {example.words.split()[0] for _, example in EXAMPLES} >= {"plan", "verify"}


def test_a_page_is_written_once_around_what_a_command_prints():
    head = "```\n$ superlora-tn plan lora --shape 8x8 --tokens 1\n"
    printed = run("plan lora --shape 8x8 --tokens 1")
    for before in ("", "else\n", printed):
        assert BLOCK.sub(again, f"a\n{head}{before}```\nb\n") == f"a\n{head}{printed}```\nb\n"


def test_what_is_shown_is_compared_to_the_last_figure():
    plan = Shown("plan lora", "price      1.2 ms\nrefused  0.1 ms\n")
    assert plan.holds("price      1.2 ms\nrefused  0.1 ms\n")
    assert not plan.holds("price      1.3 ms\nrefused  0.1 ms\n")
    assert not plan.holds("price  1.2 ms\nrefused  0.1 ms\n")
    assert not plan.holds("price      1.2 ms\nrefused  0.1 ms\nmore\n")
    dotted = Shown("plan lora", "first\n...\nlast\n")
    assert all(dotted.holds(text) for text in ("first\nlast\n", "first\na\nb\nlast\n"))
    assert not any(dotted.holds(text) for text in ("first\na\n", "a\nfirst\nlast\n", "first\nlast\na\n"))
    row = "dW  formula     3        0.059  held\n"
    assert Shown("verify lora", row).holds(row.replace("    0.059", "6.1e-05"))
    assert not Shown("verify lora", row).holds(row.replace("held", "FAILED"))
    assert not Shown("verify lora", row).holds(row.replace("  3  ", "  2  "))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_command_lines_have_arguments_that_exist(page):
    fenced = "\n".join(re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL))
    for line in re.findall(r"(?m)^(?:\$ )?superlora-tn (.*)$", fenced):
        parser().parse_args(shlex.split(line, comments=True))
    for line in re.findall(r"`superlora-tn ([^`|]+ [^`|]+)`", page.read_text()):
        parser().parse_args(shlex.split(line))


def test_the_readmes_table_of_variants_has_the_commands_counts():
    table = dict(re.findall(r"(?m)^\| `(\w+)\(.*\)` \| .* \| ([\d,]+) \|$", (ROOT / "README.md").read_text()))
    counts = {row["variant"]: f"{row['parameters']:,}" for row in json.loads(run("variants --json"))}
    assert len(table) == 9  # the README shows the presets, the command their relatives too
    assert table == {name: counts[name] for name in table}


def test_the_figures_of_the_experiments_are_their_reports():
    """Each figure behind a link to a report, in its paragraph or list, stands in that report, where it may have more digits."""
    text = (ROOT / "docs" / "reproduce.md").read_text()
    found = re.findall(r"\]\((results/\w+/report\.md)\)\)?:(.*?)(?=\n\n(?!- )|\]\(results/|\Z)", text, re.DOTALL)
    assert len(found) == 7
    for link, words in found:
        known = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", (ROOT / "docs" / link).read_text())]
        for figure in re.findall(r"(?<![\d.,])\d[\d,]*\d(?:\.\d+)?(?![\d,]*\d|\.\d)", words):
            places = len(figure.partition(".")[2])
            assert figure in {f"{number:,.{places}f}" for number in known}, f"{link} does not say {figure}"


def test_the_reference_has_every_public_name_once():
    import superlora_tn

    pages = "".join(page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md")))
    named = re.findall(r"(?m)^::: superlora_tn\.(?:tools\.)?(\w+)$", pages)
    assert sorted(named) == sorted(superlora_tn.__all__)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100


def test_the_version_is_said_once_and_the_same():
    import superlora_tn

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == superlora_tn.__version__
