"""Progress bars on standard error for long commands, and Ctrl-C as a request to stop cleanly."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

ShowProgress = Callable[[str, int, int, str, Mapping[str, float]], None]
"""Stage, units done, units in all, message, numbers of a curve."""
_SHOWN = ("loss", "acceptance_0", "acceptance_length")


@dataclass
class _Bar:
    task: TaskID
    total: int
    tenths: int = 0


@contextmanager
def progress_bars(quiet: bool = False) -> Iterator[ShowProgress]:
    """Yields a function that shows a stage's progress: a bar per stage on a terminal, a line per tenth elsewhere."""
    console = Console(stderr=True)
    bars: dict[str, _Bar] = {}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=quiet or not console.is_terminal,
    ) as progress:

        def show(stage: str, done: int, total: int, message: str, metrics: Mapping[str, float]) -> None:
            bar = bars.get(stage)
            if bar is None or bar.total != total:
                bar = bars[stage] = _Bar(progress.add_task(stage, total=total, numbers=""), total)
            numbers = "  ".join(f"{name} {metrics[name]:.3g}" for name in _SHOWN if name in metrics)
            progress.update(bar.task, completed=done, numbers=numbers)
            tenths = 10 * done // max(total, 1)
            if not quiet and (message or (tenths > bar.tenths and not console.is_terminal)):
                told = message or f"{done} of {total}  {numbers}".rstrip()
                console.print(f"{stage}: {told}", highlight=False, soft_wrap=True)
            bar.tenths = max(bar.tenths, tenths)

        yield show


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that becomes true at the first Ctrl-C; the second one ends the program at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
