"""Calibrate a device that has nothing but torch, and look at what came out.

    python -m sparsevit.latency calibrate swin_t latency.json --image-size 672 672 --threads 2
    python -m sparsevit.latency calibrate outputs/…/export latency.json --measure model
    python -m sparsevit.latency calibrate swin_t bf16.json --dtype bf16 --prior latency.json
    python -m sparsevit.latency validate latency.json
    python -m sparsevit.latency predict latency.json 0.6 0 0.2 0.4 0.5 0
    python -m sparsevit.latency predict latency.json --all > all.csv
    python -m sparsevit.latency show latency.json

`calibrate` measures whole forward passes of a backbone or of an exported model and writes a latency
table; the others read one.
"""

import argparse
import csv
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from sparsevit.backbone import BACKBONES, create_backbone
from sparsevit.latency.calibration import (
    MAX_WITH_PRIOR,
    CalibrationConfig,
    calibrate,
    describe_setting,
    validate,
)
from sparsevit.latency.machine import busy_warning, set_num_threads
from sparsevit.latency.predictor import LatencyPredictor, LatencySetting
from sparsevit.latency.subject import (
    BACKBONE,
    DTYPES,
    RUNTIMES,
    Subject,
    backbone_subject,
    model_name,
    model_subject,
    num_samples,
)
from sparsevit.latency.timing import TimingLimits
from sparsevit.sparsity import DEFAULT_CHOICES, SparsitySpace, SparsityVector


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
    prior = None if options.prior is None else LatencyPredictor.load(options.prior)
    if options.num_vectors is None:
        options.num_vectors = 110 if prior is None else MAX_WITH_PRIOR
    if options.num_held_out is None:
        options.num_held_out = 50 if prior is None else 0
    config = CalibrationConfig(
        num_vectors=options.num_vectors, num_held_out=options.num_held_out, limits=_limits(options),
        seed=options.seed,
    )  # fmt: skip
    choices = options.choices or (DEFAULT_CHOICES if prior is None else prior.space.choices)
    with _subject(
        options.what, options.measure, options.batch_size, tuple(options.image_size), options.dtype,
        options.runtime, _prepare(options.device, options.threads), trusted=options.trusted,
    ) as (subject, name):  # fmt: skip
        space = SparsitySpace(subject.config.depths, tuple(choices))
        predictor = calibrate(subject, name, space, config, _counter("forward passes"), prior=prior)
    predictor.save(options.table)
    _print_scores({**predictor.scores, "error_bar": predictor.error_bar})
    print(f"written: {options.table}")


def _validate(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    setting = predictor.setting
    is_model = setting.measures != BACKBONE
    if is_model and options.model is None:
        raise ValueError(
            f"{options.table} is about the whole model {setting.measures}: give its export with --model"
        )
    if setting.backbone not in BACKBONES:
        raise ValueError(
            f"{options.table} is about {setting.backbone!r}, which is no backbone of this release"
        )
    config = CalibrationConfig(num_held_out=options.num_vectors, limits=_limits(options), seed=options.seed)
    with _subject(
        str(options.model) if is_model else setting.backbone, "model" if is_model else BACKBONE,
        setting.batch_size, setting.image_size, setting.dtype, setting.runtime,
        _prepare(options.device, setting.num_threads or None), trusted=options.trusted,
    ) as (subject, name):  # fmt: skip
        for line in _differences(setting, describe_setting(name, subject)):
            print(f"warning: {line}", file=sys.stderr)
        _print_scores(validate(predictor, subject, config, _counter("forward passes")))


@contextmanager
def _subject(
    what: str,
    measure: str,
    batch_size: int,
    image_size: tuple[int, int],
    dtype: str,
    runtime: str,
    device: torch.device,
    *,
    trusted: bool,
) -> Iterator[tuple[Subject, str]]:
    """What is to be measured, and the name of its backbone."""
    if what in BACKBONES:
        if measure != BACKBONE:
            raise ValueError(f"{what} is a backbone: for a whole model give the folder of its export")
        name, backbone = what, create_backbone(what).to(device)
    else:
        if not Path(what).is_dir():
            raise ValueError(
                f"{what!r} is neither the folder of an export nor a backbone ({', '.join(sorted(BACKBONES))})"
            )
        from sparsevit.export import load_example, load_exported  # needs more than torch and numpy

        exported = load_exported(what, trusted=trusted).to(device)
        name, backbone = exported.config["backbone"], exported.backbone
    if measure == BACKBONE:
        with backbone_subject(
            backbone, batch_size=batch_size, image_size=image_size, dtype=dtype, runtime=runtime
        ) as subject:
            yield subject, name
        return
    example = load_example(what)
    example = [value * num_samples(example[0], batch_size) for value in example]
    task = model_name(exported.config["task"], exported.config["task_config"])
    with model_subject(exported.model, backbone, example, name=task, dtype=dtype, runtime=runtime) as subject:
        yield subject, name


def _limits(options: argparse.Namespace) -> TimingLimits:
    return TimingLimits(
        max_half_width=options.half_width, min_rounds=options.min_rounds,
        max_rounds=max(options.min_rounds, options.max_rounds),
        max_seconds=None if options.max_minutes is None else 60 * options.max_minutes,
    )  # fmt: skip


def _predict(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    if options.all == bool(options.ratios):
        raise ValueError("give the ratios of one vector, or --all")
    if options.ratios:
        latency = predictor.predict(SparsityVector(tuple(options.ratios)))
        print(f"{latency:.4g} ms ± {predictor.error_bar * latency:.2g} ms")
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*predictor.space.gene_names, "latency_ms"])
    ratios, latencies = predictor.predict_all()
    writer.writerows([*row, f"{ms:.6g}"] for row, ms in zip(ratios.tolist(), latencies.tolist(), strict=True))


def _show(options: argparse.Namespace) -> None:
    predictor = LatencyPredictor.load(options.table)
    for name, value in {**asdict(predictor.setting), "date": predictor.date, **predictor.provenance}.items():
        print(f"{name:>16}  {value}")
    measured = {each.vector: each for each in predictor.measurements}
    for name, vector in (("dense", predictor.space.dense), ("sparsest", predictor.space.sparsest)):
        print(f"{name:>16}  {predictor.predict(vector):.4g} ms ± {predictor.error_bar:.1%}", end="")
        found = measured.get(vector)
        if found is not None:
            print(f"; measured {found.latency_ms:.4g} ms ± {found.half_width:.1%}", end="")
            if found.energy_mj is not None:
                print(f", {found.energy_mj:.4g} mJ", end="")
            if found.peak_mib is not None:
                print(f", {found.peak_mib:.0f} MiB", end="")
        print()
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
        set_num_threads(num_threads)
    warning = busy_warning()
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)
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
        print(f"{name:>34}  {value:.4g}")


def _counter(what: str) -> Callable[[int, int], None]:
    """Counts on stderr, on one line where there is a terminal, else ten times in all."""
    last_tenth = 0

    def count(done: int, expected: int) -> None:
        nonlocal last_tenth
        tenth = 10 * done // expected
        if sys.stderr.isatty():
            end = "\n" if done == expected else ""
            print(f"\r{done}/{expected} {what}", end=end, file=sys.stderr, flush=True)
        elif tenth > last_tenth:
            print(f"{done}/{expected} {what}", file=sys.stderr)
        last_tenth = max(tenth, last_tenth)

    return count


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparsevit.latency", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="calibrate | validate | predict | show")
    new = commands.add_parser("calibrate", help="measure this device and write a table")
    new.add_argument("what", metavar="backbone|export", help=f"{', '.join(sorted(BACKBONES))}, or a folder")
    new.add_argument("table", type=Path, help="JSON that is written")
    new.add_argument("--measure", choices=(BACKBONE, "model"), default=BACKBONE)
    new.add_argument(
        "--image-size", type=int, nargs=2, default=(672, 672), metavar=("HEIGHT", "WIDTH"),
        help="of a backbone; a model is measured on the image of its export",
    )  # fmt: skip
    new.add_argument("--batch-size", type=int, default=1)
    new.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    new.add_argument("--runtime", choices=RUNTIMES, default="eager")
    new.add_argument("--device", default="cpu")
    new.add_argument("--threads", type=int, help="of a CPU")
    new.add_argument("--choices", type=float, nargs="+", help="ratios of a gene")
    new.add_argument("--prior", type=Path, help="table of another device, dtype, batch or size to start from")
    new.add_argument(
        "--num-vectors", type=int, help=f"that the table is fitted to: 110, or {MAX_WITH_PRIOR} with --prior"
    )
    new.add_argument("--num-held-out", type=int, help="that score it: 50, or none with --prior")
    new.add_argument("--seed", type=int, default=0)
    new.set_defaults(command=_calibrate)
    check = commands.add_parser("validate", help="measure vectors that the table has not seen")
    check.add_argument("table", type=Path)
    check.add_argument("--model", type=Path, help="export of the model that the table is about")
    check.add_argument("--device", default="cpu")
    check.add_argument("--num-vectors", type=int, default=100)
    check.add_argument("--seed", type=int, default=1)
    check.set_defaults(command=_validate)
    for command in (new, check):
        command.add_argument(
            "--trusted", action="store_true",
            help="the export may import and call the task that it names, if that is not one of ours",
        )  # fmt: skip
        limits = TimingLimits()
        command.add_argument(
            "--half-width", type=float, default=limits.max_half_width,
            help="of the 95 %% confidence interval of a latency, relative, that is narrow enough",
        )  # fmt: skip
        command.add_argument("--min-rounds", type=int, default=limits.min_rounds, help="of forward passes")
        command.add_argument("--max-rounds", type=int, default=limits.max_rounds)
        command.add_argument("--max-minutes", type=float, help="after which no further round begins")
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
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    sys.exit(main())
