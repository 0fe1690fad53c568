"""A vector made permanent: the same features, and every compiler and exporter takes it."""

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsevit import SparseSwin, SparsityVector
from sparsevit.block import KeptWindows
from sparsevit.linear import has_operators
from sparsevit.windows import WindowGrid
from tests.sparsevit_tests.tiny_swin import random_backbone

SIZE = (52, 76)  # grids that are padded, one of them odd
VECTORS = [SparsityVector((0.0,) * 4), SparsityVector((0.6, 0.0, 0.4, 0.7))]


@pytest.fixture(scope="module")
def backbone() -> SparseSwin:
    return random_backbone()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=VECTORS, ids=str)
def vector(request: pytest.FixtureRequest) -> SparsityVector:
    assert isinstance(request.param, SparsityVector)
    return request.param


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4)


def test_same_features(backbone: SparseSwin, images: Tensor, vector: SparsityVector) -> None:
    with torch.no_grad():
        found = backbone.specialize(vector, SIZE)(images)
        for mine, expected in zip(found, backbone(images, vector), strict=True):
            assert torch.equal(mine, expected)


def test_compiles_without_graph_breaks(backbone: SparseSwin, images: Tensor, vector: SparsityVector) -> None:
    torch.compiler.reset()
    compiled = torch.compile(backbone.specialize(vector, SIZE), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(images), backbone(images, vector))


@pytest.mark.parametrize("is_autocast", [True, False])
def test_compiles_in_bf16(images: Tensor, vector: SparsityVector, is_autocast: bool) -> None:
    torch.compiler.reset()
    backbone = random_backbone() if is_autocast else random_backbone().bfloat16()
    if not is_autocast:
        images = images.bfloat16()
    compiled = torch.compile(backbone.specialize(vector, SIZE), fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        pairs = zip(compiled(images), backbone(images, vector), strict=True)
        assert all((mine - expected).norm() < 2e-2 * expected.norm() for mine, expected in pairs)


def operators_of_a_compiled_graph(module: nn.Module, images: Tensor) -> set[str]:
    torch.compiler.reset()
    found: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(module, fullgraph=True, backend=note)(images)
    return {name for name in found if name.startswith("sparsevit.")}


@pytest.mark.skipif(not has_operators(torch.float32), reason="this PyTorch has no joined operators")
def test_a_compiler_is_given_joined_products_for_inference_alone(
    backbone: SparseSwin, images: Tensor, vector: SparsityVector
) -> None:
    specialized = backbone.specialize(vector, SIZE)
    with torch.no_grad():
        in_fp32 = operators_of_a_compiled_graph(specialized, images)
        in_bf16 = operators_of_a_compiled_graph(
            random_backbone().bfloat16().specialize(vector, SIZE), images.bfloat16()
        )
    products = {"sparsevit.linear.default", "sparsevit.linear_add.default"}
    assert in_fp32 == products
    if has_operators(torch.bfloat16):
        assert in_bf16 == {*products, "sparsevit.attend.default"}
    assert operators_of_a_compiled_graph(specialized, images) == set()


def test_a_compiled_backbone_notices_changed_weights(images: Tensor) -> None:
    torch.compiler.reset()
    backbone, vector = random_backbone(), VECTORS[0]
    compiled = torch.compile(backbone.specialize(vector, SIZE), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(images)
        for parameter in backbone.parameters():
            parameter.mul_(0.9)
        found = compiled(images)
    assert_close(found, [feature.detach() for feature in backbone(images, vector)])  # plain layers


def test_a_specialized_backbone_leaves_nothing_behind(backbone: SparseSwin, images: Tensor) -> None:
    def count_tables_after_a_call() -> int:
        with torch.no_grad():
            backbone.specialize(VECTORS[0], SIZE)(images)
        gc.collect()
        return sum(isinstance(each, WindowGrid | KeptWindows) for each in gc.get_objects())

    count = count_tables_after_a_call()
    assert count_tables_after_a_call() == count


def test_exports(backbone: SparseSwin, images: Tensor, vector: SparsityVector) -> None:
    exported = torch.export.export(backbone.specialize(vector, SIZE), (images,))
    with torch.no_grad():
        assert_close(exported.module()(images), backbone(images, vector))


def test_runs_in_onnxruntime(
    backbone: SparseSwin, images: Tensor, vector: SparsityVector, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone.specialize(vector, SIZE), (images,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = backbone(images, vector)
    assert_close([torch.from_numpy(np.asarray(feature)) for feature in found], expected)


def test_parameters_and_mode_are_those_of_the_backbone(backbone: SparseSwin) -> None:
    special = backbone.specialize(VECTORS[1], SIZE)
    assert not special.training
    assert SparseSwin(backbone.config).train().specialize(VECTORS[1], SIZE).training
    assert {id(p) for p in special.parameters()} == {id(p) for p in backbone.parameters()}
    assert all(name.startswith("backbone.") for name in special.state_dict())


def test_image_of_another_size(backbone: SparseSwin) -> None:
    special = backbone.specialize(VECTORS[1], SIZE)
    with pytest.raises(ValueError, match=r"specialized to images \[B, 3, 52, 76\], got \[1, 3, 64, 64\]"):
        special(torch.zeros(1, 3, 64, 64))


def test_size_smaller_than_a_patch(backbone: SparseSwin) -> None:
    with pytest.raises(ValueError, match="3×64 pixels is smaller than a patch"):
        backbone.specialize(VECTORS[1], (3, 64))


def test_vector_of_another_depth(backbone: SparseSwin) -> None:
    with pytest.raises(ValueError, match="has 2 ratios, but depths"):
        backbone.specialize(SparsityVector((0.1, 0.2)), SIZE)
