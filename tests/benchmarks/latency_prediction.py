"""Do predicted and measured latency agree? Tables are fitted, and scored on vectors that they have not seen.

    python tests/benchmarks/latency_prediction.py --output tables --settings swin_t-fp32 swin_t-bf16

A row is a setting: the root mean square of the relative errors on held-out random vectors, the same in
units of the repeat noise (the standard error of a measured latency in the same run), the share within ±5 %,
the table's error bar, Spearman's rank correlation, and what a straight line over MACs reaches on
the same vectors. "from" names the table of another setting that 15 measurements started from. Last: how
long the predictions of the whole space take. With --output the tables are kept, and are read
again where a setting starts from one of them.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sparsevit import create_backbone
from sparsevit.latency import LatencyPredictor
from sparsevit.latency.calibration import MAX_WITH_PRIOR, CalibrationConfig, calibrate
from sparsevit.latency.machine import busy_warning, device_name
from sparsevit.latency.subject import backbone_subject
from sparsevit.latency.timing import TimingLimits


@dataclass(frozen=True)
class Setting:
    backbone: str
    batch_size: int
    image_size: tuple[int, int]
    dtype: str = "fp32"
    runtime: str = "eager"
    prior: str | None = None


SETTINGS: Mapping[str, Setting] = {
    "swin_t-fp32": Setting("swin_t", 1, (672, 672)),
    "swin_t-bf16": Setting("swin_t", 1, (672, 672), "bf16"),
    "coco-embedded": Setting("swin_nano", 4, (256, 256)),
    "cityscapes-embedded": Setting("swin_nano", 4, (192, 384)),
    "nuscenes-embedded": Setting("swin_nano", 6, (96, 256)),
    "swin_t-bf16-from-fp32": Setting("swin_t", 1, (672, 672), "bf16", prior="swin_t-fp32"),
    "swin_t-batch4-from-batch1": Setting("swin_t", 4, (672, 672), prior="swin_t-fp32"),
    "swin_t-fp32-from-bf16": Setting("swin_t", 1, (672, 672), prior="swin_t-bf16"),
    "swin_t-compiled-from-eager": Setting("swin_t", 1, (672, 672), runtime="compiled", prior="swin_t-fp32"),
}
COLUMNS = (
    f"{'setting':<28}{'vectors':>8}{'RMSPE':>8}{'/noise':>8}{'±5 %':>7}{'bar':>7}"
    f"{'Spearman':>10}{'MACs RMSPE':>12}{'±5 %':>7}{'Spearman':>10}{'minutes':>9}"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--half-width", type=float, default=0.01, help="of a latency, relative")
    parser.add_argument("--max-minutes", type=float, default=6.0, help="per setting")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="folder of the tables")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(busy_warning() or "the machine is idle")
    print(COLUMNS)
    limits = TimingLimits(
        max_half_width=arguments.half_width, max_rounds=40, max_seconds=60 * arguments.max_minutes
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.settings:
            table = measure(name, folder, device, arguments.held_out, limits)
        start = time.perf_counter()
        _, latencies = table.predict_all()
        print(f"{len(latencies):,} predictions in {time.perf_counter() - start:.3f} s")


def measure(
    name: str, folder: Path, device: torch.device, num_held_out: int, limits: TimingLimits
) -> LatencyPredictor:
    """Calibrate a setting, print its row, and keep its table."""
    setting = SETTINGS[name]
    prior = None
    if setting.prior is not None:
        path = folder / f"{setting.prior}.json"
        prior = (
            LatencyPredictor.load(path)
            if path.is_file()
            else measure(setting.prior, folder, device, num_held_out, limits)
        )
    config = CalibrationConfig(
        num_vectors=110 if prior is None else MAX_WITH_PRIOR,
        num_held_out=num_held_out,
        limits=limits,
    )
    torch.manual_seed(0)
    backbone = create_backbone(setting.backbone).to(device)
    start = time.monotonic()
    with (
        backbone_subject(
            backbone, batch_size=setting.batch_size, image_size=setting.image_size, dtype=setting.dtype,
            runtime=setting.runtime,
        ) as subject,
        tqdm(desc=name, leave=False) as bar,
    ):  # fmt: skip

        def show(done: int, expected: int) -> None:
            bar.total = expected
            bar.update(done - bar.n)

        table = calibrate(subject, setting.backbone, backbone.space, config, show, prior=prior)
    table.save(folder / f"{name}.json")
    scores = table.scores
    print(
        f"{name:<28}{config.num_vectors:>8}{scores['rmspe']:>8.2%}"
        f"{scores['rmspe'] / scores['repeat_noise']:>8.2f}{scores['within_5_percent']:>7.0%}"
        f"{table.error_bar:>7.1%}{scores['spearman']:>10.4f}"
        f"{scores['macs_rmspe']:>12.2%}{scores['macs_within_5_percent']:>7.0%}{scores['macs_spearman']:>10.4f}"
        f"{(time.monotonic() - start) / 60:>9.1f}",
        flush=True,
    )
    return table


if __name__ == "__main__":
    main()
