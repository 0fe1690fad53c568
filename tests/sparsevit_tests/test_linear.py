"""The joined CPU operators compute what the plain layers do, and notice when weights change."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from sparsevit import block, parts
from sparsevit import linear as linear_module
from sparsevit.attention import WindowAttention
from sparsevit.linear import has_operators, is_fused, join, linear
from tests.sparsevit_tests.tiny_swin import random_backbone

pytestmark = pytest.mark.skipif(
    not has_operators(torch.float32), reason="this PyTorch has no joined operators"
)
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not has_operators(torch.bfloat16), reason="on this CPU oneDNN multiplies no bfloat16"
        ),
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_to_the_plain_layers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40).to(dtype)
    x, residual = torch.randn(3, 7, 24).to(dtype), torch.randn(3, 7, 40).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        assert is_fused(x.device, dtype)
        joined = join(layer, x.device, dtype)
        for mine, plain in (
            (joined(x), layer(x)),
            (joined.gelu(x), F.gelu(layer(x))),
            (joined.add(x, residual), residual + layer(x)),
            (joined.add(x, residual.double()), residual.double() + layer(x)),
        ):
            assert mine.dtype == plain.dtype
            torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_for_compilers_keep_what_they_promise(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    x, residual = torch.randn(3, 7, 24).to(dtype), torch.randn(3, 7, 40).to(dtype)
    qkv, logit_bias = torch.randn(6, 16, 3, 2, 8).bfloat16(), torch.randn(3, 2, 16, 16).bfloat16()
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.sparsevit
    torch.library.opcheck(operators.linear.default, (x, weight, bias, "gelu"), test_utils=checks)
    torch.library.opcheck(operators.linear.default, (x, weight, None, "none"), test_utils=checks)
    torch.library.opcheck(operators.linear_add.default, (x, residual, weight, bias), test_utils=checks)
    mask_type = torch.tensor([0, 1, 2, 2, 1, 0])
    torch.library.opcheck(operators.attend.default, (qkv, logit_bias, mask_type), test_utils=checks)


def test_operators_are_found_under_autocast_too() -> None:
    program = (
        "import torch, sparsevit.linear\n"
        "with torch.inference_mode(), torch.autocast('cpu', dtype=torch.bfloat16):\n"
        "    print(sparsevit.linear.has_operators(torch.float32))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_without_an_operator_for_a_dtype_its_layers_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN refuses bfloat16 on a CPU without AVX-512; float32 goes on as before."""

    def refuse(weight: Tensor, *others: object) -> Tensor:
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("bf16 path needs the cpu support avx512bw")
        packed: Tensor = reorder(weight, *others)
        return packed

    reorder = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    linear_module._try_operators.cache_clear()
    try:
        layer, x = nn.Linear(24, 40), torch.randn(5, 24)
        with torch.no_grad():
            assert is_fused(x.device, torch.float32) and not is_fused(x.device, torch.bfloat16)
            low = copy.deepcopy(layer).bfloat16()
            assert torch.equal(linear(x.bfloat16(), low), low(x.bfloat16()))
    finally:
        linear_module._try_operators.cache_clear()


def test_layer_without_bias() -> None:
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, layer), layer(x))


def step(layer: nn.Linear) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(torch.ones(2, 24)).sum().backward()
        optimizer.step()


def replace(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


@pytest.mark.parametrize(
    "change",
    [
        step,
        replace,
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.mul_(2),
        lambda layer: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        lambda layer: layer.load_state_dict(nn.Linear(24, 40).state_dict()),
        lambda layer: layer.weight.detach().numpy().fill(3.0),
    ],
)
def test_changed_weight_is_noticed(change: Callable[[nn.Linear], object]) -> None:
    layer, x = nn.Linear(24, 40), torch.randn(5, 24)
    with torch.no_grad():
        before = linear(x, layer)
        change(layer)
        after = linear(x, layer)
        torch.testing.assert_close(after, layer(x))
        assert not torch.allclose(before, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_change_of_any_single_value_in_place_is_noticed(dtype: torch.dtype) -> None:
    """Wherever it stands; a sample of the values would not see it."""
    layer, x = nn.Linear(24, 20).to(dtype), torch.eye(24).to(dtype)
    with torch.no_grad():
        for place in range(layer.weight.numel()):
            linear(x, layer)
            layer.weight.view(-1)[place] = 5.0
            assert linear(x, layer)[place % 24, place // 24] > 4
        linear(x, layer)
        layer.bias[3] = 100.0
        torch.testing.assert_close(linear(x, layer), layer(x), rtol=2e-2, atol=1e-4)


def test_weights_without_a_version_counter_are_never_stale() -> None:
    """Such are those that were made in inference mode."""
    with torch.inference_mode():
        layer, x = nn.Linear(24, 40), torch.randn(5, 24)
        for place in range(0, 960, 7):
            linear(x, layer)
            layer.weight.view(-1)[place] = 5.0
            torch.testing.assert_close(linear(x, layer), layer(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_a_backbone_computes_with_the_weights_it_has_now(dtype: torch.dtype, ratio: float) -> None:
    """One value of every parameter is changed in place between two passes, as an optimiser does."""
    backbone = random_backbone().to(dtype)
    images = torch.randn(1, 3, 52, 76, generator=torch.Generator().manual_seed(0)).to(dtype)
    vector = backbone.space.uniform(ratio)
    with torch.no_grad():
        before = backbone(images, vector)
        for parameter in backbone.parameters():
            parameter.view(-1)[1] += 0.5
        fresh = copy.deepcopy(backbone)
        for stale, mine, expected in zip(
            before, backbone(images, vector), fresh(images, vector), strict=True
        ):
            assert torch.equal(mine, expected) and not torch.equal(mine, stale)


def test_hooks_and_parametrizations_are_respected() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    x = torch.randn(5, 24)
    hooked, parametrized = nn.Linear(24, 40), nn.Linear(24, 40)
    hooked.register_forward_hook(lambda module, inputs, output: output + 1)
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    with torch.no_grad():
        for layer in (hooked, parametrized):
            torch.testing.assert_close(linear(x, layer), layer(x))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [(64, 64), (52, 90)])
def test_chunked_inference_equals_the_plain_forward_pass(
    monkeypatch: pytest.MonkeyPatch, seed: int, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(block, "CHUNK_BYTES", 3 * 16 * 64 * 4)  # three windows of the first stage
    monkeypatch.setattr(parts, "PART_BYTES", 1000)
    backbone = random_backbone()
    generator = torch.Generator().manual_seed(seed)
    vector = backbone.space.draw(generator) if seed else backbone.space.dense
    images = torch.randn(3, 3, *size, generator=generator)
    plain = backbone(images, vector)
    with torch.inference_mode():
        for mine, expected in zip(backbone(images, vector), plain, strict=True):
            torch.testing.assert_close(mine, expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_backbone_trains_after_inference_at_the_same_size() -> None:
    backbone, images = random_backbone(), torch.randn(1, 3, 52, 90)
    with torch.inference_mode():
        backbone(images)
    backbone(images)[-1].sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.stages.parameters())


@pytest.mark.parametrize("is_autocast", [True, False])
def test_bf16_inference_is_as_close_to_fp32_as_the_plain_forward_pass(is_autocast: bool) -> None:
    backbone = random_backbone()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = backbone(images)[-1].detach()
    low = backbone if is_autocast else copy.deepcopy(backbone).bfloat16()
    low_images = images if is_autocast else images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        plain = low(low_images)[-1].detach()
        with torch.no_grad():
            mine = low(low_images)[-1]
    assert mine.dtype == plain.dtype

    def error(feature: Tensor) -> float:
        return float((feature.float() - exact).norm() / exact.norm())

    assert error(mine) < 1.2 * error(plain) + 1e-3


@pytest.mark.parametrize("logit", [0.0, 256.0, -256.0])
def test_bf16_attention_at_logits_beyond_the_range_of_exponentials(logit: float) -> None:
    torch.manual_seed(0)
    attention = WindowAttention(channels=16, num_heads=2, window_size=4).bfloat16()
    qkv = torch.randn(3, 16, 48).bfloat16()
    qkv[..., :32] = 0.0  # queries and keys: all logits are the bias
    with torch.no_grad():
        found = attention.attend(qkv, torch.full((1, 2, 16, 16), logit))
        values = qkv[..., 32:]
    expected = values.mean(dim=1, keepdim=True).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
