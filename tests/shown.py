"""Commands that the docs show with what they print: a fenced block whose first line is ``$ superlora-tn ...``.

A line of three dots stands for any lines. ``python tests/shown.py`` writes the blocks again, but for those with dots.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from superlora_tn.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```\n\$ superlora-tn (?P<words>[^\n]*)\n(?P<printed>.*?)```", re.DOTALL)
DOTS = "...\n"
# Rounding errors are the machine's, so a certificate is compared without them, without widths, and without TensorLy's release.
ROUNDING = (
    (r"(?m)(\d) +[\d.e-]+  held$", r"\1  some  held"),
    (r"tensorly [\d.]+\d", "tensorly"),
    (r" {2,}", "  "),
)


@dataclass(frozen=True)
class Shown:
    """A command's words, and what a page says it prints."""

    words: str
    printed: str

    def holds(self, printed: str) -> bool:
        """Whether the command's output is what the page shows, its dots filled."""
        expected, found = (_normalised(self.words, text) for text in (self.printed, printed))
        lines = (r"(?:.*\n)*" if line == DOTS else re.escape(line) for line in expected.splitlines(keepends=True))
        return re.fullmatch("".join(lines), found) is not None


def _normalised(words: str, text: str) -> str:
    for pattern, place in ROUNDING if words.startswith("verify ") else ():
        text = re.sub(pattern, place, text)
    return text


def shown(page: Path) -> Iterator[Shown]:
    """What a page shows."""
    return (Shown(block["words"], block["printed"]) for block in BLOCK.finditer(page.read_text()))


def run(words: str) -> str:
    """What a command prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        status = main(shlex.split(words))
    assert status == 0, f"superlora-tn {words} ended with status {status}"
    return out.getvalue()


def again(block: re.Match[str]) -> str:
    """A block with what its command prints now; one with dots as it is."""
    if DOTS in block["printed"].splitlines(keepends=True):
        return block[0]
    return f"```\n$ superlora-tn {block['words']}\n{run(block['words'])}```"


def rewrite(say: Callable[[str], object] = print) -> None:
    """Write each page again whose blocks are not what their commands print."""
    for page in PAGES:
        text = page.read_text()
        if (new := BLOCK.sub(again, text)) != text:
            page.write_text(new)
            say(f"written: {page.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(rewrite())
