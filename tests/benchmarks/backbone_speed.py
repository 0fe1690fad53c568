"""How fast the backbone is, dense and sparse, beside torchvision, timm and Hugging Face.

    python tests/benchmarks/backbone_speed.py                       every setting, fp32 and bf16, eager
    python tests/benchmarks/backbone_speed.py --settings swin_t-672 --modes eager compiled onnxruntime
    python tests/benchmarks/backbone_speed.py --device cuda --dtypes bf16 fp16 --modes eager cuda_graph

All networks of a setting have the same weights and are timed in one interleaved run; a row is the
median. "of peer" is the ratio to the fastest peer in the same mode, "of dense" to our own dense
forward pass in the same mode, "MACs" the same ratio of multiply-accumulates, "of peak" the share of
the rate of a large square matrix product in the same dtype, measured beside. "peak MiB" is what an
eager forward pass needs on top of the loaded network: on a CPU the growth of the resident set in a
fresh process. "compiled" is torch.compile, on a CPU with inductor's `freezing`; "cuda_graph" an eager
pass captured on a GPU. onnxruntime takes fp32 alone, on a CPU. Freed memory is kept
(`sparsevit.allocator`), for the peers too.
"""

import argparse
import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import timm
import torch
import torch._inductor.config
import torchvision
import transformers
from torch import Tensor, nn

from sparsevit import BACKBONES, SparseSwin, SparsityVector, create_backbone, export_backbone_weights
from sparsevit.allocator import keep_freed_memory
from sparsevit.latency.machine import device_name
from sparsevit.latency.macs import count_macs
from sparsevit.latency.memory import peak_mib
from sparsevit.latency.subject import DTYPES, RUNTIMES, graphed_call, specialized_call
from sparsevit.latency.timing import TimingLimits, time_interleaved

OURS = "ours"
PEERS = ("torchvision", "timm", "huggingface")
PUBLISHED = ((0.3, 0, 0.1, 0.2, 0.2, 0), (0.6, 0, 0.2, 0.4, 0.5, 0), (0.7, 0, 0.2, 0.4, 0.5, 0))
UNIFORM = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8)
PEAK_SIZE = 4096


@dataclass(frozen=True)
class Setting:
    backbone: str
    batch_size: int
    height: int
    width: int

    @property
    def image_size(self) -> tuple[int, int]:
        return self.height, self.width


SETTINGS = {
    "swin_t-672": Setting("swin_t", 1, 672, 672),
    "swin_t-672-batch4": Setting("swin_t", 4, 672, 672),
    "swin_t-cameras": Setting("swin_t", 6, 256, 704),
    "swin_l-1024x2048": Setting("swin_l", 1, 1024, 2048),
}


def build_ours(setting: Setting) -> SparseSwin:
    torch.manual_seed(0)
    return create_backbone(setting.backbone).eval()


def build(name: str, setting: Setting) -> nn.Module:
    """A network of ours or of a peer, all with the same weights; its call computes every stage."""
    backbone = build_ours(setting)
    if name == OURS:
        return backbone
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
        model = timm.models.swin_transformer.SwinTransformer(
            img_size=setting.image_size, embed_dim=config.embed_dim, depths=config.depths,
            num_heads=config.num_heads, window_size=config.window_size, num_classes=0, global_pool="",
        )  # fmt: skip
    model.load_state_dict(weights, strict=False)
    features = model.get_submodule("features") if name == "torchvision" else model
    return features.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=sorted(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=RUNTIMES)
    parser.add_argument("--ratios", nargs="+", type=float, default=UNIFORM, help="the uniform vectors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    keep_freed_memory()
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    libraries = {
        "torchvision": torchvision, "timm": timm, "transformers": transformers, "onnxruntime": onnxruntime,
    }  # fmt: skip
    print(
        f"torch {torch.__version__}",
        *(f"{name} {library.__version__}" for name, library in libraries.items()),
        sep=", ",
    )
    for name in arguments.settings:
        vectors = vectors_of(SETTINGS[name], sorted({0.0, *arguments.ratios}))
        networks = {network: build(network, SETTINGS[name]) for network in (OURS, *PEERS)}
        for dtype in arguments.dtypes:
            print_table(name, dtype, device, networks, arguments.modes, vectors, arguments.rounds)


def print_table(
    setting_name: str,
    dtype_name: str,
    device: torch.device,
    networks: Mapping[str, nn.Module],
    modes: Sequence[str],
    vectors: Sequence[SparsityVector],
    num_rounds: int,
) -> None:
    setting, dtype = SETTINGS[setting_name], DTYPES[dtype_name]
    if dtype_name != "fp32" or device.type != "cpu":
        modes = [mode for mode in modes if mode != "onnxruntime"]
    networks = {name: copy.deepcopy(network).to(device, dtype) for name, network in networks.items()}
    ours = networks[OURS]
    assert isinstance(ours, SparseSwin)
    images = torch.randn(setting.batch_size, 3, *setting.image_size, device=device, dtype=dtype)
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    torch._dynamo.config.recompile_limit = 8 * len(vectors)  # every vector is a graph of its own
    torch._inductor.config.freezing = device.type == "cpu"  # weights are constants, packed beforehand
    square = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=dtype)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        for mode in modes:
            for vector in vectors:
                calls[mode, str(vector)] = call_of(ours, vector, images, mode, Path(folder))
            for name in PEERS if mode != "onnxruntime" else ():
                calls[mode, name] = call_of_peer(networks[name], images, mode)
        calls["", "peak"] = partial(torch.mm, square, square)
        for call in calls.values():
            call()  # compiles
        timings = time_interleaved(
            list(calls.values()), calls[modes[0], str(vectors[0])], device=device,
            limits=TimingLimits.exactly(num_rounds), generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    medians = dict(zip(calls, (timing.median_ms for timing in timings.calls), strict=True))
    peak_rate = 2 * PEAK_SIZE**3 / medians.pop(("", "peak"))
    if device.type == "cpu":
        memory = {name: peak_of(name, setting, dtype_name) for name in networks}
    else:
        memory = {name: measure_peak(network, images) for name, network in networks.items()}
    macs = {str(vector): macs_of(setting, vector) for vector in vectors}
    dense = str(vectors[0])
    print(f"\n{setting_name}, {dtype_name}; matrix products reach {peak_rate / 1e6:.0f} GFLOP/s")
    print(f"{'':<40} {'ms':>8} {'of peer':>8} {'of dense':>9} {'MACs':>6} {'of peak':>8} {'peak MiB':>9}")
    for (mode, name), milliseconds in medians.items():
        fastest = min((medians[mode, peer] for peer in PEERS if (mode, peer) in medians), default=None)
        num_macs = macs.get(name, macs[dense])
        columns = [
            f"{mode}, {name}".ljust(40),
            f"{milliseconds:8.{1 if milliseconds >= 20 else 3}f}",
            " " * 8 if fastest is None else f"{milliseconds / fastest:8.3f}",
            f"{milliseconds / medians[mode, dense]:9.3f}",
            f"{num_macs / macs[dense]:6.3f}",
            f"{2 * num_macs / milliseconds / peak_rate:8.2f}",
        ]
        if mode == "eager" and name in (dense, *PEERS):
            columns.append(f"{memory[OURS if name == dense else name]:9.0f}")
        print(*columns, flush=True)


def call_of(
    backbone: SparseSwin, vector: SparsityVector, images: Tensor, mode: str, folder: Path
) -> Callable[[], object]:
    """A forward pass of ours at a vector."""
    eager = partial(backbone, images, vector)
    if mode == "eager":
        return eager
    if mode == "cuda_graph":
        return graphed_call(eager, images.device)
    return specialized_call(backbone, images, vector, mode, folder)


def call_of_peer(network: nn.Module, images: Tensor, mode: str) -> Callable[[], object]:
    """A dense forward pass of another library."""
    if mode == "cuda_graph":
        return graphed_call(partial(network, images), images.device)
    if mode == "compiled":
        graphs = "reduce-overhead" if images.device.type == "cuda" else None  # as for ours
        return partial(torch.compile(network, dynamic=False, mode=graphs), images)
    return partial(network, images)


def vectors_of(setting: Setting, ratios: Sequence[float]) -> list[SparsityVector]:
    num_genes = sum((depth + 1) // 2 for depth in BACKBONES[setting.backbone].depths)
    vectors = [SparsityVector((ratio,) * num_genes) for ratio in ratios]
    if setting.backbone == "swin_t":
        vectors += [SparsityVector(ratios) for ratios in PUBLISHED]
    return vectors


def macs_of(setting: Setting, vector: SparsityVector) -> int:
    size = (setting.height, setting.width)
    return setting.batch_size * count_macs(BACKBONES[setting.backbone], size, vector)


def peak_of(name: str, setting: Setting, dtype_name: str) -> float:
    """Memory that one dense forward pass needs on a CPU, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_of, (name, setting, dtype_name))


def _peak_of(name: str, setting: Setting, dtype_name: str) -> float:
    dtype = DTYPES[dtype_name]
    images = torch.randn(setting.batch_size, 3, *setting.image_size).to(dtype)
    return measure_peak(build(name, setting).to(dtype), images)


@torch.inference_mode()
def measure_peak(network: nn.Module, images: Tensor) -> float:
    """MiB that one dense forward pass needs on top of what is loaded."""
    peak = peak_mib(partial(network, images), images.device)
    assert peak is not None
    return peak


if __name__ == "__main__":
    main()
