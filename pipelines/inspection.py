"""What a run would start from, without starting it: ``until=check``."""

from dataclasses import asdict

import pandas as pd
from omegaconf import OmegaConf

from pipelines import build
from pipelines.context import Run
from sparsevit.data.split import DataSplit

MAX_NAMES = 8


def print_findings(run: Run) -> None:
    """The data by class, split and size, what of the checkpoint is used, and what the model is set to.

    Every image and all of the checkpoint are read, as a run does before its first stage.
    """
    run.verify_images()
    names = ("train", "search", "report")
    print(f"data:        {run.config.data.root}")
    for name, split in zip(names, run.splits, strict=True):
        print(f"  {name + ':':<10} {_described(split)}")
    counts = {name: split.class_counts() for name, split in zip(names, run.splits, strict=True)}
    if any(counts.values()):
        table = pd.DataFrame(counts).rename_axis("class")
        print(f"\n{table.to_string()}\n")
        unseen = [str(name) for name in table.index[(table["train"] == 0) & (table.sum(axis=1) > 0)]]
        if unseen:
            print(f"warning: no training sample has {_listed(unseen)}\n")
    _print_checkpoint(run)
    print("model:")
    settings = OmegaConf.to_yaml(OmegaConf.create(asdict(run.task.config)))
    print("".join(f"  {line}\n" for line in settings.splitlines()), end="")


def _described(split: DataSplit) -> str:
    sizes = split.image_sizes()
    parts = [f"{len(split)} samples of {split.split!r}", f"{sum(split.class_counts().values())} annotations"]
    if split.num_dropped:
        parts.append(f"{split.num_dropped} more dropped: no area")
    if sizes:
        smallest, largest = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        parts.append(
            f"{smallest[1]}×{smallest[0]} pixels"
            if len(sizes) == 1
            else f"{smallest[1]}×{smallest[0]} to {largest[1]}×{largest[0]} pixels in {len(sizes)} sizes"
        )
    return ", ".join(parts)


def _print_checkpoint(run: Run) -> None:
    path = build.initial_weights(run.config)
    _, report = run.initial_model()
    if report is None:
        print("checkpoint:  none: the model is trained from random weights")
        return
    print(f"checkpoint:  {path}")
    print(f"  written by {report.format}, its backbone by {report.backbone_format}")
    if report.resized:
        print(f"  resampled from another window size: {len(report.resized)} tables of relative positions")
    print(f"  not in it, so trained anew: {_listed(report.uncovered)}")
    print(f"  in it and not used: {_listed(report.unused)}")


def _listed(names: list[str] | tuple[str, ...]) -> str:
    if not names:
        return "nothing"
    more = f" … ({len(names)})" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
