"""Hooks of the site's build (mkdocs.yml): the benchmarks' page, which lies beside them, and links out of this folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Any, config: Any) -> Any:
    """Add benchmarks/README.md as a page; leave out this script."""
    found = files.get_file_from_path("site.py")
    if found is not None:
        files.remove(found)
    files.append(File.generated(config, "benchmarks.md", content=(ROOT / "benchmarks" / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to the benchmarks' page lead to its copy; other files of the repository are named, not linked."""
    markdown = markdown.replace("](../benchmarks/README.md)", "](benchmarks.md)")
    return re.sub(r"\[([^\]]*)\]\((\.\./)+(?!README)[^)]*\)", r"\1", markdown)
