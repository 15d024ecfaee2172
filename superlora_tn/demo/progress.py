"""Progress of long runs: a call-back of every training loop, and bars that it moves."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

OnStep = Callable[[int, int, float], None]
"""Called after each optimiser step with (steps done, steps in all, loss)."""


def progress(console: Console) -> Progress:
    """Progress bars on a console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def on_step(bar: Progress, description: str) -> OnStep:
    """A call-back (steps done, steps in all, loss) that shows one row while it is under way."""
    row = bar.add_task(description, total=None)

    def show(step: int, steps: int, loss: float) -> None:
        bar.update(row, completed=step, total=steps, description=f"{description}, loss {loss:.2f}", visible=step < steps)

    return show
