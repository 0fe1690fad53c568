"""The progress bar of everything that takes longer than a moment."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


@contextmanager
def progress_bar(
    total: int | None, label: str, *, unit: str = "step", initial: int = 0
) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields the function that advances it."""
    with tqdm(
        total=total, desc=f"  {label}", unit=unit, initial=initial, leave=False, dynamic_ncols=True,
    ) as bar:  # fmt: skip

        def advance(amount: int = 1, **shown: Any) -> None:
            bar.update(amount)
            if shown:
                bar.set_postfix(shown, refresh=False)

        yield advance


@contextmanager
def expected_progress(label: str, *, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of work whose amount is only expected; yields what takes the done and the expected."""
    with tqdm(desc=f"  {label}", unit=unit, leave=False, dynamic_ncols=True) as bar:

        def show(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        yield show
