"""What is made of a backbone or a model to measure it: its images, dtype, runtime and name."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector, SwinConfig
from sparsevit.data.order import seeded
from sparsevit.latency import subject
from sparsevit.latency.subject import Subject, backbone_subject, check_runtime, model_subject

CPU, META = torch.device("cpu"), torch.device("meta")
VECTOR = SparsityVector((0.5,))


@pytest.fixture
def backbone() -> SparseSwin:
    return SparseSwin(SwinConfig(embed_dim=8, depths=(2,), num_heads=(1,), window_size=4))


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """That freed memory is kept, and what is asked whether it fits."""
    found: list[Any] = []
    monkeypatch.setattr(subject, "require_memory", lambda *asked: found.append(asked))
    monkeypatch.setattr(subject, "keep_freed_memory", lambda: found.append("kept"))
    return found


def seen_by(module: nn.Module, call: Callable[[], object]) -> Tensor:
    images: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda module, arguments: images.append(arguments[0]))
    call()
    hook.remove()
    return images[0]


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_backbone_is_copied_and_given_a_batch_of_random_images(
    backbone: SparseSwin, checked: list[Any], dtype: str, expected: torch.dtype
) -> None:
    backbone.train()
    with backbone_subject(backbone, batch_size=3, image_size=(16, 24), dtype=dtype, seed=5) as found:
        call: Any = found.call_of(VECTOR)
    assert (found.measures, found.config, found.device) == ("backbone", backbone.config, CPU)
    assert (found.batch_size, found.image_size, found.dtype, found.runtime) == (3, (16, 24), dtype, "eager")
    copied, (images, vector) = call.func, call.args
    assert vector == VECTOR
    drawn = torch.randn(3, 3, 16, 24, generator=seeded(5, 1)).to(expected)
    assert torch.equal(images, drawn)
    assert copied is not backbone and not copied.training and backbone.training
    assert all(p.dtype == expected and not p.requires_grad for p in copied.parameters())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in backbone.parameters())
    kept, (one_image, device, batch_size) = checked
    assert (kept, device, batch_size) == ("kept", CPU, 3)
    assert torch.equal(
        seen_by(copied, one_image), torch.randn(1, 3, 16, 24, generator=seeded(5, 1)).to(expected)
    )
    with backbone_subject(backbone, batch_size=1, image_size=(4, 4)) as found:
        call = found.call_of(VECTOR)
    assert torch.equal(call.args[0], torch.randn(1, 3, 4, 4, generator=seeded(0, 1)))


@pytest.mark.parametrize(("batch_size", "image_size"), [(0, (8, 8)), (1, (8, 0)), (-1, (8, 8))])
def test_a_batch_and_a_size_start_at_1(
    backbone: SparseSwin, batch_size: int, image_size: tuple[int, int]
) -> None:
    with (
        pytest.raises(ValueError, match=f"batch and image size start at 1, got {batch_size} and"),
        backbone_subject(backbone, batch_size=batch_size, image_size=image_size),
    ):
        pass


class Model(nn.Module):
    """Takes images and words; halves of the images reach its backbone."""

    def __init__(self, backbone: SparseSwin) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: list[Tensor], words: list[str], *, sparsity: SparsityVector) -> object:
        features = self.backbone(torch.stack(images)[..., :16], sparsity)
        return words, sparsity, features[0].dtype, torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("fp32", (torch.float32, False)), ("bf16", (torch.bfloat16, True)), ("fp16", (torch.float16, True))],
)
def test_a_model_is_given_its_inputs_in_evaluation_under_autocast(
    backbone: SparseSwin, checked: list[Any], was_training: bool, dtype: str,
    expected: tuple[torch.dtype, bool],
) -> None:  # fmt: skip
    model = Model(backbone).train(was_training)
    images, words = [torch.rand(3, 24, 32) for _ in range(3)], ["a", "b", "c"]
    with model_subject(model, backbone, [images, words], name="mine", dtype=dtype) as found:
        assert not model.training
        assert found == Subject("mine", backbone.config, 3, (24, 16), dtype, "eager", CPU, found.call_of)
        with torch.inference_mode():
            assert found.call_of(VECTOR)() == (words, VECTOR, *expected)
            kept, (one_image, device, batch_size) = checked
            assert (kept, device, batch_size) == ("kept", CPU, 3)
            assert one_image() == (["a"], backbone.space.dense, *expected)
    assert model.training == was_training
    assert not backbone._forward_pre_hooks


def test_a_model_that_fails_is_left_as_it_was(backbone: SparseSwin, checked: list[Any]) -> None:
    model = Model(backbone).train()
    with (
        pytest.raises(RuntimeError, match="stack expects each tensor"),
        model_subject(model, backbone, [[torch.rand(3, 8, 8), torch.rand(3, 9, 9)], ["a", "b"]], name="m"),
    ):
        pass
    assert model.training
    assert not backbone._forward_pre_hooks


def test_inputs_may_be_nested() -> None:
    value = torch.zeros(2)
    found = subject._to({"a": [value, (value, "word")], "b": value, "c": None}, META)
    first, (second, word) = found["a"]
    assert all(each.device == META for each in (first, second, found["b"]))
    assert (word, found["c"]) == ("word", None)


def test_a_model_has_a_name_of_its_own() -> None:
    config = {"size": (2, 3), "classes": 4, "where": Path("a/b")}
    content = json.dumps({"classes": 4, "size": [2, 3], "where": "a/b"})
    assert subject.model_name("task", config) == f"task {hashlib.sha256(content.encode()).hexdigest()[:8]}"


@pytest.mark.parametrize("name", ["onnxruntime", "onnxscript"])
def test_both_packages_are_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed(monkeypatch)
    check_runtime("onnxruntime", "fp32", CPU)
    check_runtime("onnxruntime", "fp16", CPU)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"needs `pip install onnxruntime onnxscript`: .*{name}"):
        check_runtime("onnxruntime", "fp32", CPU)


def test_runtimes_that_need_nothing() -> None:
    for runtime, device in (("eager", CPU), ("compiled", CPU), ("cuda_graph", torch.device("cuda"))):
        check_runtime(runtime, "bf16", device)


class Options:
    def __init__(self) -> None:
        self.intra_op_num_threads = 0
        self.entries: list[tuple[str, str]] = []

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries.append((key, value))


def installed(monkeypatch: pytest.MonkeyPatch, session: object = None) -> None:
    runtime = SimpleNamespace(SessionOptions=Options, InferenceSession=session)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "onnxscript", SimpleNamespace())


def test_onnx_runtime_is_given_the_vector_made_permanent_and_as_many_threads(
    backbone: SparseSwin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, exports, sessions = tmp_path / "special.onnx", [], []

    def export(module: nn.Module, images: tuple[Tensor, ...], where: Path, **options: object) -> None:
        assert not torch.is_inference_mode_enabled()
        exports.append((module, images[0], where, options))
        where.touch()

    class Session:
        def __init__(self, where: Path, options: Options, providers: list[str]) -> None:
            assert where.exists()
            sessions.append((where, options, providers))

        def get_inputs(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(name="images")]

        def run(self, names: object, feed: dict[str, object]) -> object:
            return names, feed

    monkeypatch.setattr(torch.onnx, "export", export)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    installed(monkeypatch, Session)
    images = torch.rand(2, 3, 16, 24)
    with torch.inference_mode():
        call = subject.specialized_call(backbone, images, VECTOR, "onnxruntime", tmp_path)
    ((module, exported, where, options),) = exports
    assert (where, options) == (path, {"dynamo": True, "verbose": False})
    assert torch.equal(exported, images) and exported is not images
    features, expected = module(images), backbone(images, VECTOR)
    assert all(map(torch.equal, features, expected))
    ((where, session, providers),) = sessions
    assert (where, providers, session.intra_op_num_threads) == (path, ["CPUExecutionProvider"], 3)
    assert session.entries == [("session.intra_op.allow_spinning", "0")]
    assert not path.exists()
    result: Any = call()
    assert result[0] is None and set(result[1]) == {"images"}
    assert (result[1]["images"] == images.numpy()).all()


def test_a_compiler_is_given_the_vector_made_permanent(
    backbone: SparseSwin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, object]] = []

    def compile(module: nn.Module, **options: object) -> nn.Module:
        asked.append(options)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    images = torch.rand(1, 3, 16, 24)
    features: Any = subject.specialized_call(backbone, images, VECTOR, "compiled", tmp_path)()
    assert all(map(torch.equal, features, backbone(images, VECTOR)))
    assert asked == [{"fullgraph": True, "dynamic": False, "mode": None}]


def test_a_gpu_compiles_to_a_graph_and_has_a_provider(
    backbone: SparseSwin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[object] = []
    images: Any = SimpleNamespace(
        shape=(1, 3, 16, 24), device=torch.device("cuda"), clone=lambda: None, cpu=lambda: torch.zeros(1)
    )  # fmt: skip

    def session(path: Path, options: Options, providers: list[str]) -> SimpleNamespace:
        found.append(providers)
        return SimpleNamespace(get_inputs=lambda: [SimpleNamespace(name="images")], run=print)

    def make(module: nn.Module, **options: object) -> Callable[[], None]:
        found.append(options["mode"])
        return lambda: None

    installed(monkeypatch, session)
    monkeypatch.setattr(torch, "compile", make)
    monkeypatch.setattr(torch.onnx, "export", lambda module, images, path, **options: path.touch())
    subject.specialized_call(backbone, images, VECTOR, "compiled", tmp_path)
    subject.specialized_call(backbone, images, VECTOR, "onnxruntime", tmp_path)
    assert found == ["reduce-overhead", ["CUDAExecutionProvider"]]


def test_graphs_of_a_subject_share_their_memory(
    backbone: SparseSwin, checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(subject, "check_runtime", lambda runtime, dtype, device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(subject, "graphed_call", lambda *given: asked.append(given))
    with backbone_subject(backbone, batch_size=1, image_size=(8, 8), runtime="cuda_graph") as found:
        found.call_of(VECTOR)
    ((call, device, pool),) = asked
    assert (call.args[1], device, pool) == (VECTOR, CPU, "a pool")


def test_a_compiler_has_room_for_a_graph_of_every_vector_while_it_measures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resets: list[None] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(None))

    def settings() -> tuple[int, int, bool]:
        config = torch._dynamo.config
        return (
            config.recompile_limit, config.accumulated_recompile_limit, torch._inductor.config.freezing,
        )  # fmt: skip

    before = settings()
    for runtime in ("eager", "onnxruntime", "cuda_graph"):
        with subject._room_for_graphs(runtime):
            assert settings() == before
    assert not resets
    with subject._room_for_graphs("compiled"):
        assert settings() == (10**6, 10**6, True)
        assert not resets
    assert settings() == before
    assert len(resets) == 1


def test_a_subject_makes_its_calls_where_its_runtime_says(
    backbone: SparseSwin, checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    rooms: list[str] = []

    @contextmanager
    def room(runtime: str) -> Iterator[None]:
        rooms.append(runtime)
        yield

    monkeypatch.setattr(subject, "specialized_call", lambda *given: asked.append(given))
    monkeypatch.setattr(subject, "_room_for_graphs", room)
    with backbone_subject(backbone, batch_size=1, image_size=(8, 8), runtime="compiled") as found:
        found.call_of(VECTOR)
        ((copied, images, vector, runtime, folder),) = asked
        assert folder.is_dir()
    assert copied.config == backbone.config
    assert (images.shape, vector, runtime) == ((1, 3, 8, 8), VECTOR, "compiled")
    assert folder.name.startswith("sparsevit-onnx-") and not folder.exists()
    assert rooms == ["compiled"]
