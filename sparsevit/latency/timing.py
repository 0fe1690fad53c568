"""Timing of calls side by side: warmed up, interleaved in random order, drift divided out."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def time_once_ms(call: Call, device: torch.device) -> float:
    """Milliseconds of one call, the device's queue drained before and after."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - start)


def time_interleaved_ms(
    calls: Sequence[Call],
    reference: Call,
    *,
    device: torch.device,
    num_rounds: int,
    generator: torch.Generator,
    reference_every: int = 4,
    on_call: Callable[[], None] = lambda: None,
) -> tuple[list[list[float]], list[float]]:
    """Time all calls `num_rounds` times, in another random order each round.

    The machine's speed drifts, so every time is divided by that of the nearest run of
    `reference` and multiplied by the reference's median.

    Returns:
        For every call its corrected times, and the raw times of the reference.
    """
    for _ in range(3):
        time_once_ms(reference, device)
    relative: list[list[float]] = [[] for _ in calls]
    references: list[float] = []
    for _ in range(num_rounds):
        order = torch.randperm(len(calls), generator=generator).tolist()
        for position, index in enumerate(order):
            if position % reference_every == 0:
                # The smaller of two: a disturbed reference would bias all calls that it scales.
                references.append(min(time_once_ms(reference, device) for _ in range(2)))
            relative[index].append(time_once_ms(calls[index], device) / references[-1])
            on_call()
    scale = statistics.median(references)
    return [[scale * ratio for ratio in ratios] for ratios in relative], references


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
