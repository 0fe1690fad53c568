"""The order of training samples, as a pure function of the seed: a resumed run continues it."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from sparsevit.data.sample import Sample


class TrainingOrder(Sampler[tuple[int, int]]):
    """Shuffled epochs, one after another, beginning at any position.

    Yields the index of a sample and the seed of its augmentation.
    """

    def __init__(self, num_samples: int, *, seed: int, start: int, stop: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = -1, []
        for position in range(self.start, self.stop):
            if position // self.num_samples != epoch:
                epoch = position // self.num_samples
                order = torch.randperm(self.num_samples, generator=seeded(self.seed, epoch)).tolist()
            yield order[position % self.num_samples], derive_seed(self.seed, position)


class SeededSamples(Dataset[Sample]):
    """Looks up ``(index, seed)``: the augmentation of a sample draws from that seed alone."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Sample:
        sample, seed = index
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global state
            torch.default_generator.manual_seed(seed)
            return self.dataset[sample]


def derive_seed(*parts: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64 steps)."""
    state = 0
    for part in parts:
        state = (state ^ (part & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def seeded(*parts: int) -> torch.Generator:
    """A generator for one purpose, from the seed and the numbers that tell it from others."""
    return torch.Generator().manual_seed(derive_seed(*parts))
