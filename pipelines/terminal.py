"""The live view of a search in the terminal; plain lines where there is no terminal."""

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from search.dispatch import Budget
from search.pareto import FrontMember
from search.progress import SearchProgress

NUM_BANDS = 5
SECONDS_BETWEEN_LINES = 15.0


class SearchView:
    """Shows what is done, running and failed, the best per latency band, hypervolume, and time left.

    Args:
        num_running: how many trials are out.
        accuracy: the objective to show the best of.
        cost: the cheap objective that the bands divide.
    """

    def __init__(
        self,
        progress: SearchProgress,
        budget: Budget,
        num_running: Callable[[], int],
        *,
        accuracy: str,
        cost: str,
        console: Console | None = None,
    ) -> None:
        self._progress = progress
        self._budget = budget
        self._num_running = num_running
        self._accuracy = accuracy
        self._cost = cost
        self._range = progress.problem.reachable(cost)
        self._pace_from: tuple[float, int] | None = (
            None  # the first result here: workers take a while to start
        )
        self._last_line = -math.inf
        self._console = console or Console(stderr=True)
        self._live = Live(
            get_renderable=self.render, console=self._console, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        else:
            self._print_line()

    def update(self) -> None:
        """A trial has finished."""
        if self._pace_from is None:
            self._pace_from = time.monotonic(), self._progress.num_counted
        if self._console.is_terminal or time.monotonic() - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = time.monotonic()
        self._print_line()

    def render(self) -> Group:
        """What the terminal shows."""
        total = self._budget.num_evaluations
        bar = ProgressBar(total=total, completed=self._progress.num_counted, width=40)
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column(self._cost)
        table.add_column(f"best {self._accuracy}", justify="right")
        table.add_column("vector")
        for low, high, best in self.bands():
            cells = ("–", "") if best is None else (f"{best.values[self._accuracy]:.3f}", str(best.vector))
            table.add_row(f"{low:.4g} – {high:.4g}", *cells)
        return Group(Text(f"  search: {self.line()}"), Padding(bar, (0, 2)), Padding(table, (0, 2)))

    def line(self) -> str:
        """The state in one line."""
        progress, total = self._progress, self._budget.num_evaluations
        parts = [
            f"{progress.num_counted}{'' if total is None else f'/{total}'} vectors",
            f"{self._num_running()} running",
            f"{len(progress.failures)} failed",
            f"hypervolume {progress.hypervolume:.4g}",
            f"{len(progress.front.members)} on the front",
        ]
        if progress.num_infeasible:
            parts.append(f"{progress.num_infeasible} infeasible")
        left_s = self.seconds_left()
        return ", ".join(parts) + ("" if left_s is None else f", {_duration(left_s)} left")

    def bands(self) -> list[tuple[float, float, FrontMember | None]]:
        """Equal parts of the reachable cost, and the most accurate member of the front in each."""
        low, high = self._range
        width = (high - low) / NUM_BANDS
        bounds = [(low + band * width, low + (band + 1) * width) for band in range(NUM_BANDS)]
        return [(start, end, self._best(start, end, is_last=end == bounds[-1][1])) for start, end in bounds]

    def seconds_left(self) -> float | None:
        """Until the first budget that can be foreseen is spent; None before anything is known."""
        candidates = []
        num_counted = self._progress.num_counted
        since, num_before = self._pace_from or (0.0, num_counted)
        if self._budget.num_evaluations is not None and num_counted > num_before:
            pace = (time.monotonic() - since) / (num_counted - num_before)
            candidates.append(pace * (self._budget.num_evaluations - num_counted))
        if self._budget.seconds is not None:
            candidates.append(max(0.0, self._budget.seconds - self._progress.elapsed_s))
        return min(candidates, default=None)

    def _best(self, start: float, end: float, *, is_last: bool) -> FrontMember | None:
        members = [
            member
            for member in self._progress.front.members
            if start <= member.values[self._cost] < (math.inf if is_last else end)
        ]
        return max(members, key=lambda member: member.values[self._accuracy], default=None)

    def _print_line(self) -> None:
        self._console.print(f"  search: {self.line()}", highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
