"""What is recorded of a forward pass, and how it is shown."""

import pytest
import torch

from sparsevit import SparsityVector, create_backbone
from sparsevit.kept_windows import DIMMED, trace_kept_windows
from sparsevit.sparsity import count_kept_windows


def test_dense_computes_everything() -> None:
    backbone = create_backbone("swin_nano").eval()
    images = torch.zeros(2, 3, 70, 130)
    with torch.inference_mode(), trace_kept_windows(backbone) as trace:
        backbone(images)
    assert torch.equal(trace.images, images)
    assert [tuple(share.shape) for share in trace.shares] == [(2, 17, 32), (2, 9, 16), (2, 5, 8), (2, 3, 4)]
    assert all(bool((share == 1).all()) for share in trace.shares)
    assert all(trace.overlay(stage).shape == (2, 3, 70, 130) for stage in range(4))


def test_shares_count_the_blocks_that_computed_a_token() -> None:
    backbone = create_backbone("swin_nano").eval()
    vector = SparsityVector((0.5, 0.0, 0.0, 0.3, 0.8, 0.0))
    with torch.inference_mode(), trace_kept_windows(backbone) as trace:
        backbone(torch.randn(1, 3, 128, 128), vector)
    num_windows = (64, 16, 4, 1)
    assert float(trace.shares[0].mean()) == pytest.approx(count_kept_windows(num_windows[0], 0.5) / 64)
    assert bool((trace.shares[1] == 1).all())
    kept = [count_kept_windows(num_windows[2], ratio) / 4 for ratio in (0.0, 0.3, 0.8)]
    assert float(trace.shares[2].mean()) == pytest.approx(sum(kept) / 3)
    assert bool((trace.shares[3] == 1).all())


def test_overlay_darkens_what_was_left_out() -> None:
    backbone = create_backbone("swin_nano").eval()
    images = torch.zeros(1, 3, 64, 64)
    images[..., :16, :16] = 2.0  # a bright window
    with torch.inference_mode(), trace_kept_windows(backbone) as trace:
        backbone(images, SparsityVector((0.8, 0.0, 0.0, 0.0, 0.0, 0.0)))
    picture = trace.overlay(0)[0].float()
    dense = trace.overlay(1)[0].float()
    share = trace.shares[0][0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    dropped = share == 0
    assert dropped.any() and (share == 1).any()
    assert torch.equal(picture[:, share == 1], dense[:, share == 1])
    assert picture[:, dropped].sum() / dense[:, dropped].sum() == pytest.approx(DIMMED, abs=0.02)


def test_nothing_stays_hooked() -> None:
    backbone = create_backbone("swin_nano").eval()
    with pytest.raises(ValueError, match="images are a batch"), trace_kept_windows(backbone):
        backbone(torch.zeros(3, 64, 64))
    with trace_kept_windows(backbone) as trace:
        backbone(torch.zeros(1, 3, 64, 64))
    before = [share.clone() for share in trace.shares]
    backbone(torch.ones(2, 3, 32, 32), SparsityVector((0.8,) * 6))
    assert trace.images.shape == (1, 3, 64, 64)
    assert all(map(torch.equal, trace.shares, before))
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in backbone.modules() for kind in kinds)
