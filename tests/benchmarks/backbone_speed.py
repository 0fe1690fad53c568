"""How fast the backbone is, dense and sparse, beside torchvision, timm and Hugging Face.

    python tests/benchmarks/backbone_speed.py                       every setting, fp32 and bf16, eager
    python tests/benchmarks/backbone_speed.py --settings swin_t-672 --dtypes bf16 --compile

All networks of a setting have the same weights and are timed in one interleaved run; a row is the
median. "of peer" is the ratio to the fastest peer, "of dense" to our own dense forward pass, "MACs"
the same ratio of multiply-accumulates, "of peak" the share of the rate of a large square matrix
product in the same dtype, measured beside. "peak MiB" is what a forward pass needs on top of the
loaded network: on a CPU the growth of the resident set in a fresh process.
"""

import argparse
import ctypes
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
import transformers
from torch import nn

from sparsevit import BACKBONES, SparsityVector, create_backbone, export_backbone_weights
from sparsevit.latency.calibration import DTYPES, device_name
from sparsevit.latency.macs import count_macs
from sparsevit.latency.timing import time_interleaved_ms

PUBLISHED = ((0.3, 0, 0.1, 0.2, 0.2, 0), (0.6, 0, 0.2, 0.4, 0.5, 0), (0.7, 0, 0.2, 0.4, 0.5, 0))
UNIFORM = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
PEAK_SIZE = 4096


@dataclass(frozen=True)
class Setting:
    backbone: str
    batch_size: int
    height: int
    width: int


SETTINGS = {
    "swin_t-672": Setting("swin_t", 1, 672, 672),
    "swin_t-672-batch4": Setting("swin_t", 4, 672, 672),
    "swin_t-cameras": Setting("swin_t", 6, 256, 704),
    "swin_l-1024x2048": Setting("swin_l", 1, 1024, 2048),
}


def build(name: str, setting: Setting) -> nn.Module:
    """A network of ours or of a peer, all with the same weights; its call computes every stage."""
    torch.manual_seed(0)
    backbone = create_backbone(setting.backbone)
    if name == "ours":
        return backbone.eval()
    config = backbone.config
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        export_backbone_weights(backbone, path, name)
        if name == "huggingface":
            loaded: nn.Module = transformers.SwinBackbone.from_pretrained(path)
            return loaded.train(False)
        weights = torch.load(path, weights_only=True)
    if name == "torchvision":
        window = [config.window_size] * 2
        model: nn.Module = torchvision.models.SwinTransformer(
            [config.patch_size] * 2, config.embed_dim, list(config.depths), list(config.num_heads), window
        )
    else:
        size = (setting.height, setting.width)
        model = timm.models.swin_transformer.SwinTransformer(
            img_size=size, embed_dim=config.embed_dim, depths=config.depths, num_heads=config.num_heads,
            window_size=config.window_size, num_classes=0, global_pool="",
        )  # fmt: skip
    model.load_state_dict(weights, strict=False)
    features = model.get_submodule("features") if name == "torchvision" else model
    return features.eval()


PEERS = ("torchvision", "timm", "huggingface")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile every network")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    libraries = {"torchvision": torchvision, "timm": timm, "transformers": transformers}
    print(
        f"torch {torch.__version__}",
        *(f"{name} {library.__version__}" for name, library in libraries.items()),
        sep=", ",
    )
    for name in arguments.settings:
        for dtype in arguments.dtypes:
            print_table(name, dtype, device, arguments.rounds, arguments.compile)


def print_table(
    setting_name: str, dtype_name: str, device: torch.device, rounds: int, compiled: bool
) -> None:
    setting, dtype = SETTINGS[setting_name], DTYPES[dtype_name]
    models = {name: build(name, setting).to(device, dtype) for name in ("ours", *PEERS)}
    images = torch.randn(setting.batch_size, 3, setting.height, setting.width, device=device, dtype=dtype)
    vectors = vectors_of(setting)
    calls: dict[str, Callable[[], object]] = {
        str(vector): partial(models["ours"], images, vector) for vector in vectors
    }
    calls |= {name: partial(models[name], images) for name in PEERS}
    if compiled:
        calls = {name: torch.compile(call, dynamic=False) for name, call in calls.items()}
    square = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype)
    calls["peak"] = partial(torch.mm, square, square)
    with torch.inference_mode():
        times, _ = time_interleaved_ms(
            list(calls.values()), calls[str(vectors[0])], device=device, num_rounds=rounds,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    medians = dict(zip(calls, map(statistics.median, times), strict=True))
    peak_rate = 2 * PEAK_SIZE**3 / medians["peak"]
    memory = {name: peak_mib(name, setting, dtype_name, device) for name in ("ours", *PEERS)}
    print(
        f"\n{setting_name}, {dtype_name}, {'compiled' if compiled else 'eager'}; "
        f"matrix products reach {peak_rate / 1e6:.0f} GFLOP/s"
    )
    print(f"{'':<28} {'ms':>8} {'of peer':>8} {'of dense':>9} {'MACs':>6} {'of peak':>8} {'peak MiB':>9}")
    fastest = min(medians[name] for name in PEERS)
    dense_macs = macs_of(setting, vectors[0])
    for vector in vectors:
        milliseconds, macs = medians[str(vector)], macs_of(setting, vector)
        share = 2 * macs / milliseconds / peak_rate
        memory_column = f"{memory['ours']:9.0f}" if vector is vectors[0] else ""
        print(
            f"{vector!s:<28} {milliseconds:8.1f} {milliseconds / fastest:8.3f} "
            f"{milliseconds / medians[str(vectors[0])]:9.3f} {macs / dense_macs:6.3f} {share:8.2f} "
            f"{memory_column}".rstrip()
        )
    for name in PEERS:
        share = 2 * dense_macs / medians[name] / peak_rate
        print(
            f"{name + ', dense':<28} {medians[name]:8.1f} {medians[name] / fastest:8.3f} {'':>9} {'':>6} "
            f"{share:8.2f} {memory[name]:9.0f}",
            flush=True,
        )


def vectors_of(setting: Setting) -> list[SparsityVector]:
    num_genes = sum((depth + 1) // 2 for depth in BACKBONES[setting.backbone].depths)
    vectors = [SparsityVector((ratio,) * num_genes) for ratio in UNIFORM]
    if setting.backbone == "swin_t":
        vectors += [SparsityVector(ratios) for ratios in PUBLISHED]
    return vectors


def macs_of(setting: Setting, vector: SparsityVector) -> int:
    size = (setting.height, setting.width)
    return setting.batch_size * count_macs(BACKBONES[setting.backbone], size, vector)


def peak_mib(name: str, setting: Setting, dtype_name: str, device: torch.device) -> float:
    """Memory that one dense forward pass needs on top of the network, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_mib, (name, setting, dtype_name, str(device)))


@torch.inference_mode()
def _peak_mib(name: str, setting: Setting, dtype_name: str, device: str) -> float:
    model = build(name, setting).to(device, DTYPES[dtype_name])
    images = torch.randn(setting.batch_size, 3, setting.height, setting.width)
    images = images.to(device, DTYPES[dtype_name])
    if device != "cpu":
        model(images)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what building the network left behind
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before_kib = _status_kib("VmRSS")
    model(images)
    return (_status_kib("VmHWM") - before_kib) / 1024


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    main()
