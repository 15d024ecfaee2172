"""README and docs: their Python runs, their commands exist, their links lead somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from superlora_tn.cli import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def test_the_version_is_said_once_and_the_same():
    import superlora_tn

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == superlora_tn.__version__
