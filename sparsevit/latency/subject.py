"""What is measured: a backbone or a whole model, in eager mode, graphed, compiled, or by ONNX Runtime."""

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit.allocator import keep_freed_memory
from sparsevit.backbone import SparseSwin, SwinConfig
from sparsevit.data.order import seeded
from sparsevit.latency.memory import require_memory
from sparsevit.latency.timing import Call
from sparsevit.sparsity import SparsityVector

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RUNTIMES = ("eager", "cuda_graph", "compiled", "onnxruntime")
BACKBONE = "backbone"
NUM_WARM_UPS = 3


@dataclass(frozen=True)
class Subject:
    """Something whose latency depends on a sparsity vector.

    Attributes:
        measures: `BACKBONE`, or the name of a whole model.
        config: of the backbone.
        batch_size, image_size: what the backbone sees.
        call_of: a forward pass at a vector, ready to be timed. What is compiled or exported for it is made
            here.
    """

    measures: str
    config: SwinConfig
    batch_size: int
    image_size: tuple[int, int]
    dtype: str
    runtime: str
    device: torch.device
    call_of: Callable[[SparsityVector], Call]


@contextmanager
def backbone_subject(
    backbone: SparseSwin,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    dtype: str = "fp32",
    runtime: str = "eager",
    seed: int = 0,
) -> Iterator[Subject]:
    """A copy of a backbone on the device it is on, with random images. Weights hardly matter for latency.

    On a CPU memory is kept from a forward pass to the next (`keep_freed_memory`), as in `load_exported`.

    Raises:
        ValueError: for a dtype or runtime that is unknown or cannot be had.
    """
    device = next(backbone.parameters()).device
    check_runtime(runtime, dtype, device)
    if batch_size < 1 or min(image_size) < 1:
        raise ValueError(f"batch and image size start at 1, got {batch_size} and {image_size}")
    keep_freed_memory()
    measured = copy.deepcopy(backbone).eval().to(DTYPES[dtype]).requires_grad_(False)

    def draw(num_images: int) -> Tensor:
        images = torch.randn(num_images, 3, *image_size, generator=seeded(seed, 1))
        return images.to(device, DTYPES[dtype])

    with torch.inference_mode():
        require_memory(lambda: measured(draw(1)), device, batch_size)
    images = draw(batch_size)
    with tempfile.TemporaryDirectory(prefix="sparsevit-onnx-") as folder, _room_for_graphs(runtime):
        pool = torch.cuda.graph_pool_handle() if runtime == "cuda_graph" else None

        def call_of(vector: SparsityVector) -> Call:
            eager = partial(measured, images, vector)
            if runtime == "eager":
                return eager
            if runtime == "cuda_graph":
                return graphed_call(eager, device, pool)
            return specialized_call(measured, images, vector, runtime, Path(folder))

        yield Subject(BACKBONE, backbone.config, batch_size, image_size, dtype, runtime, device, call_of)


@contextmanager
def model_subject(
    model: nn.Module,
    backbone: SparseSwin,
    inputs: Sequence[Any],
    *,
    name: str,
    dtype: str = "fp32",
    runtime: str = "eager",
) -> Iterator[Subject]:
    """A whole model, from images to its predictions, on the device it is on.

    Backbone, neck, heads and post-processing are measured, on real images: what post-processing costs
    depends on what is found. Lower precision is by autocast, as in the evaluation.

    Args:
        model: takes `inputs` and ``sparsity=…``.
        backbone: inside `model`.
        inputs: what the model takes: first a list of images, the batch.
        name: of the model, for the record: tables of other models are told apart by it.

    Raises:
        ValueError: for a dtype or runtime that is unknown or cannot be had.
    """
    device = next(model.parameters()).device
    check_runtime(runtime, dtype, device)
    if runtime != "eager":
        raise ValueError(
            f"a whole model is measured in eager mode, got runtime={runtime}: its post-processing has no "
            "static shapes; measure=backbone takes every runtime"
        )
    keep_freed_memory()
    moved = [_to(value, device) for value in inputs]
    num_inputs = len(moved[0])
    was_training = model.training
    model.eval()

    def forward(vector: SparsityVector, count: int = num_inputs) -> object:
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            return model(*(value[:count] for value in moved), sparsity=vector)

    try:
        with torch.inference_mode():
            require_memory(lambda: forward(backbone.space.dense, 1), device, num_inputs)
            batch_size, image_size = _seen(backbone, forward)
        yield Subject(
            name, backbone.config, batch_size, image_size, dtype, runtime, device,
            lambda vector: partial(forward, vector),
        )  # fmt: skip
    finally:
        model.train(was_training)


def model_name(task: str, task_config: Mapping[str, Any]) -> str:
    """Tells whole models apart: the task, and a digest of everything that it was built from."""
    content = json.dumps(task_config, sort_keys=True, default=str)
    return f"{task} {hashlib.sha256(content.encode()).hexdigest()[:8]}"


def num_samples(images: Sequence[Tensor], batch_size: int) -> int:
    """Samples whose images are a batch of the backbone.

    Args:
        images: of some samples: [3, h, w] each, or [cameras, 3, h, w].

    Raises:
        ValueError: if the batch is no multiple of the images of a sample.
    """
    per_sample = images[0].shape[0] if images[0].ndim == 4 else 1
    if batch_size % per_sample:
        raise ValueError(
            f"the batch is counted in images that the backbone sees, and a sample has {per_sample}: give a "
            f"multiple of that, got {batch_size}"
        )
    return batch_size // per_sample


def check_runtime(runtime: str, dtype: str, device: torch.device) -> None:
    """Raise `ValueError` unless the runtime is known and installed, and takes the dtype and the device."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime must be one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if runtime == "cuda_graph" and device.type != "cuda":
        raise ValueError(
            f"runtime=cuda_graph needs a CUDA device, got {device}: take runtime=eager or compiled"
        )
    if runtime == "onnxruntime":
        if dtype == "bf16":
            raise ValueError("onnxruntime has no bf16 kernels: take dtype=fp32 or fp16")
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"runtime=onnxruntime needs `pip install onnxruntime onnxscript`: {error}"
            ) from error


def _seen(backbone: SparseSwin, forward: Callable[[SparsityVector], object]) -> tuple[int, tuple[int, int]]:
    """How many images reach the backbone, and their height and width."""
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shapes.append(tuple(arguments[0].shape))

    hook = backbone.register_forward_pre_hook(note)
    try:
        forward(backbone.space.dense)
    finally:
        hook.remove()
    batch_size, _, height, width = shapes[0]
    return batch_size, (height, width)


@contextmanager
def _room_for_graphs(runtime: str) -> Iterator[None]:
    """Every vector is a graph of its own; PyTorch expects no more than a few of a module."""
    if runtime != "compiled":
        yield
        return
    import torch._dynamo
    import torch._inductor.config

    with (
        torch._dynamo.config.patch(recompile_limit=10**6, accumulated_recompile_limit=10**6),
        torch._inductor.config.patch(freezing=True),
    ):
        yield
    torch._dynamo.reset()


def graphed_call(call: Call, device: torch.device, pool: Any = None) -> Call:
    """A forward pass as a CUDA graph, which the device gets as a whole; what it returns is dropped.

    In eager mode a GPU waits for Python to launch its kernels, hundreds in a pass, whatever they compute.

    Args:
        pool: of memory, by `torch.cuda.graph_pool_handle`, for graphs that never run at the same time.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is made at the first call is not captured
            for _ in range(NUM_WARM_UPS):
                call()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            call()
    replay: Call = graph.replay
    return replay


def specialized_call(
    backbone: SparseSwin, images: Tensor, vector: SparsityVector, runtime: str, folder: Path
) -> Call:
    """A forward pass at one vector, compiled, or exported and run by ONNX Runtime.

    Args:
        folder: for the exported file, which is removed again.
    """
    special = backbone.specialize(vector, (images.shape[-2], images.shape[-1]))
    if runtime == "compiled":
        mode = "reduce-overhead" if images.device.type == "cuda" else None  # a CUDA graph
        return partial(torch.compile(special, fullgraph=True, dynamic=False, mode=mode), images)
    import onnxruntime

    path = folder / "special.onnx"
    with torch.inference_mode(False):
        torch.onnx.export(special, (images.clone(),), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # disturbs what follows
    is_gpu = images.device.type == "cuda"
    providers = ["CUDAExecutionProvider"] if is_gpu else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    path.unlink()
    return partial(session.run, None, {session.get_inputs()[0].name: images.cpu().numpy()})


def _to(value: Any, device: torch.device) -> Any:
    """Nested lists, tuples and dictionaries of tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(each, device) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to(each, device) for each in value]
    return value
