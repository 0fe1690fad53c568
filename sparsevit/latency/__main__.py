"""Calibrate a device that has nothing but torch, and look at what came out.

    python -m sparsevit.latency calibrate swin_t latency.json --image-size 672 672 --threads 2
    python -m sparsevit.latency validate latency.json
    python -m sparsevit.latency predict latency.json 0.6 0 0.2 0.4 0.5 0
    python -m sparsevit.latency predict latency.json --all > all.csv
    python -m sparsevit.latency show latency.json

`calibrate` measures whole forward passes of a backbone and writes a latency table; the others read one.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sparsevit.backbone import BACKBONES, create_backbone
from sparsevit.latency.calibration import (
    DTYPES,
    CalibrationConfig,
    calibrate,
    describe_setting,
    num_calls,
    validate,
)
from sparsevit.latency.machine import busy_share
from sparsevit.latency.predictor import LatencyPredictor, LatencySetting
from sparsevit.sparsity import DEFAULT_CHOICES, SparsitySpace, SparsityVector

MAX_BUSY_SHARE = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 2 for bad input, named on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _calibrate(options: argparse.Namespace) -> None:
    if not options.table.resolve().parent.is_dir():
        raise ValueError(f"there is no folder {options.table.resolve().parent} for the table")
    config = CalibrationConfig(
        batch_size=options.batch_size, image_size=tuple(options.image_size), dtype=options.dtype,
        num_vectors=options.num_vectors, num_held_out=options.num_held_out, num_rounds=options.num_rounds,
        seed=options.seed,
    )  # fmt: skip
    depths = BACKBONES[options.backbone].depths
    space = SparsitySpace(depths, tuple(options.choices))
    device = _prepare(options.device, options.threads)
    backbone = create_backbone(options.backbone).to(device)
    predictor = calibrate(
        backbone, options.backbone, space, config, _counter(num_calls(space, config), "forward passes")
    )
    predictor.save(options.table)
    _print_scores(predictor.scores)
    print(f"written: {options.table}")


def _validate(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    setting = predictor.setting
    if setting.backbone not in BACKBONES:
        raise ValueError(
            f"{options.table} is about {setting.backbone!r}, which is no backbone of this release"
        )
    config = CalibrationConfig(
        batch_size=setting.batch_size, image_size=setting.image_size, dtype=setting.dtype,
        num_held_out=options.num_vectors, num_rounds=options.num_rounds, seed=options.seed,
    )  # fmt: skip
    device = _prepare(options.device, setting.num_threads or None)
    for line in _differences(setting, describe_setting(setting.backbone, config, device)):
        print(f"warning: {line}", file=sys.stderr)
    backbone = create_backbone(setting.backbone).to(device)
    total = config.num_rounds * config.num_held_out
    _print_scores(validate(predictor, backbone, config, _counter(total, "forward passes")))


def _predict(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    if options.all == bool(options.ratios):
        raise ValueError("give the ratios of one vector, or --all")
    if options.ratios:
        print(f"{predictor.predict(SparsityVector(tuple(options.ratios))):.4g} ms")
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*predictor.space.gene_names, "latency_ms"])
    ratios, latencies = predictor.predict_all()
    writer.writerows([*row, f"{ms:.6g}"] for row, ms in zip(ratios.tolist(), latencies.tolist(), strict=True))


def _show(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    for name, value in {**asdict(predictor.setting), "date": predictor.date, **predictor.provenance}.items():
        print(f"{name:>16}  {value}")
    dense, sparsest = predictor.space.dense, predictor.space.sparsest
    print(f"{'dense':>16}  {predictor.predict(dense):.4g} ms")
    print(f"{'sparsest':>16}  {predictor.predict(sparsest):.4g} ms")
    print(f"\n{'ms added at':>16}", *(f"{choice:>7g}" for choice in predictor.space.choices))
    for name, row in zip(predictor.space.gene_names, predictor.terms_ms, strict=True):
        print(f"{name:>16}", *(f"{round(term, 2) + 0.0:7.2f}" for term in row))
    print()
    _print_scores(predictor.scores)


def _prepare(name: str, num_threads: int | None) -> torch.device:
    """The device, checked, with so many threads on a CPU.

    Raises:
        ValueError: if it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"the device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"--threads must be at least 1, got {num_threads}")
    if num_threads is not None and device.type == "cpu":
        torch.set_num_threads(num_threads)
    busy = busy_share()
    if busy > MAX_BUSY_SHARE:
        print(
            f"warning: other processes take {busy:.0%} of this machine's processors; what is measured beside "
            "them is not what the device can do",
            file=sys.stderr,
        )
    return device


def _differences(known: LatencySetting, here: LatencySetting) -> list[str]:
    """In words, where what is measured here is not what the table is about."""
    return [
        f"the table is about {name}={value}, this is {name}={getattr(here, name)}"
        for name, value in asdict(known).items()
        if value != getattr(here, name)
    ]


def _print_scores(scores: Mapping[str, float]) -> None:
    for name, value in scores.items():
        print(f"{name:>24}  {value:.4g}")


def _counter(total: int, what: str) -> Callable[[], None]:
    """Counts on stderr, on one line where there is a terminal, else ten times in all."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done}/{total} {what}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done % max(1, total // 10) == 0:
            print(f"{done}/{total} {what}", file=sys.stderr)

    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsevit.latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="calibrate | validate | predict | show")
    new = commands.add_parser("calibrate", help="measure this device and write a table")
    new.add_argument("backbone", choices=sorted(BACKBONES))
    new.add_argument("table", type=Path, help="JSON that is written")
    new.add_argument("--image-size", type=int, nargs=2, default=(672, 672), metavar=("HEIGHT", "WIDTH"))
    new.add_argument("--batch-size", type=int, default=1)
    new.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    new.add_argument("--device", default="cpu")
    new.add_argument("--threads", type=int, help="of a CPU")
    new.add_argument("--choices", type=float, nargs="+", default=DEFAULT_CHOICES, help="ratios of a gene")
    new.add_argument("--num-vectors", type=int, default=110, help="that the table is fitted to")
    new.add_argument("--num-held-out", type=int, default=50, help="that score it")
    new.add_argument("--num-rounds", type=int, default=7, help="forward passes per vector")
    new.add_argument("--seed", type=int, default=0)
    new.set_defaults(command=_calibrate)
    check = commands.add_parser("validate", help="measure vectors that the table has not seen")
    check.add_argument("table", type=Path)
    check.add_argument("--device", default="cpu")
    check.add_argument("--num-vectors", type=int, default=100)
    check.add_argument("--num-rounds", type=int, default=7)
    check.add_argument("--seed", type=int, default=1)
    check.set_defaults(command=_validate)
    ask = commands.add_parser("predict", help="milliseconds of a vector, or of all, as CSV")
    ask.add_argument("table", type=Path)
    ask.add_argument("ratios", type=float, nargs="*")
    ask.add_argument("--all", action="store_true")
    ask.set_defaults(command=_predict)
    show = commands.add_parser("show", help="what was measured, on what, and how well it predicts")
    show.add_argument("table", type=Path)
    show.set_defaults(command=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
