"""Data sets that the project draws itself: written once, whole or not at all."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sparsevit.data.errors import DataError

MARKER = "provenance.json"
WriteSplit = Callable[[Path, str, np.random.Generator], None]


class GeneratedConfig(Protocol):
    """What every generator is told."""

    @property
    def num_images(self) -> Mapping[str, int]: ...

    @property
    def seed(self) -> int: ...


def write_generated(root: Path, generator: str, config: GeneratedConfig, write_split: WriteSplit) -> None:
    """Write all splits below `root`, every one with its own stream of random numbers.

    Does nothing where the same configuration is already written in full. The folder appears only when
    it is complete.

    Args:
        generator: the module that draws, for the record.
        write_split: writes one split below a folder.

    Raises:
        DataError: if `root` holds something else.
    """
    described: Any = {"generator": generator, "config": asdict(config)}  # type: ignore[call-overload]
    marker = root / MARKER
    if marker.is_file() and json.loads(marker.read_text()) == json.loads(json.dumps(described)):
        return
    if root.exists() and not marker.is_file():
        raise DataError(
            f"{root} exists and was not written by a generator of this project: choose another "
            "data.generated.root"
        )
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, split in enumerate(config.num_images):
        write_split(partial, split, np.random.default_rng((config.seed, number)))
    (partial / MARKER).write_text(json.dumps(described, indent=2))
    shutil.rmtree(root, ignore_errors=True)
    partial.rename(root)
