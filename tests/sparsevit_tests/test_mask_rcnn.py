"""Mask R-CNN: every photo at its own scale, and what comes after the network as mmdet defines it."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import cv2  # comes with nuscenes-devkit
import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from sparsevit import SparsityVector, create_backbone
from sparsevit.data.coco import CocoInstances
from sparsevit.tasks.instance_segmentation import InstanceSegmentation
from sparsevit.tasks.mask_rcnn import Conventions, MaskRCNNConfig, PhotoInput, SparseMaskRCNN
from sparsevit.tasks.mask_rcnn.anchors import StridedAnchors
from sparsevit.tasks.mask_rcnn.pasting import paste_masks
from sparsevit.tasks.mask_rcnn.photos import resize_uint8, to_input
from sparsevit.tasks.mask_rcnn.roi_heads import PyramidPool
from tests.oracles import mmdet_post_processing as oracle
from tests.sparsevit_tests.drawn_photos import write_drawn_photos

SMALL = MaskRCNNConfig(
    num_classes=3, image_size=160, fpn_channels=16, box_channels=16, mask_channels=16,
    smallest_anchor=32, num_proposals=40, num_rois_per_image=16, num_detections=12,
)  # fmt: skip
PADDED = PhotoInput(longest_side=200, shortest_side=120, resize="uint8")
SIZES = ((427, 640), (360, 640), (640, 427), (500, 333))
VECTOR = SparsityVector((0.5, 0.3, 0.2, 0.4, 0.6, 0.0))


def lively(config: MaskRCNNConfig, seed: int = 0) -> SparseMaskRCNN:
    """A model whose random heads disagree about what is where."""
    torch.manual_seed(seed)
    model = SparseMaskRCNN(create_backbone("swin_nano"), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("cls_logits", "cls_score.weight", "bbox_pred.weight")):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def photos() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *size, generator=generator) for size in SIZES]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-5) -> None:
    """Equal to the last digits; the edges of masks move with the boxes."""
    assert len(expected["boxes"]) > 0
    assert torch.equal(found["labels"], expected["labels"])
    for name, allowed in (("boxes", 1e-4), ("scores", 1e-5), ("masks", tolerance)):
        torch.testing.assert_close(found[name], expected[name], atol=allowed, rtol=1e-5)


@pytest.mark.parametrize("photo_input", [None, PADDED], ids=["square", "padded"])
@pytest.mark.parametrize("sparsity", [None, VECTOR], ids=["dense", "sparse"])
def test_predictions_do_not_depend_on_other_photos(
    photo_input: PhotoInput | None, sparsity: SparsityVector | None
) -> None:
    """Alone in a new model, after others, in a batch with others, first or last: the same."""
    config = replace(SMALL, input=photo_input)
    with torch.inference_mode():
        alone = [lively(config)([photo], sparsity=sparsity)[0] for photo in photos()]
        used = lively(config)
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
            for index in order:
                assert_same(used([photos()[index]], sparsity=sparsity)[0], alone[index])
            batch = used([photos()[index] for index in order], sparsity=sparsity)
            for index, found in zip(order, batch, strict=True):
                assert_same(found, alone[index], tolerance=1e-4)


@pytest.mark.parametrize(
    ("photo_input", "size", "resized", "padded"),
    [
        (PhotoInput(1333, 800), (427, 640), (800, 1199), (800, 1216)),
        (PhotoInput(1333, 800), (360, 640), (750, 1333), (768, 1344)),
        (PhotoInput(1333, 800), (640, 427), (1199, 800), (1216, 800)),
        (PhotoInput(400, 240), (428, 640), (240, 359), (256, 384)),  # 239.5 and 358.9: half up, not down
        (PhotoInput(672, 672, divisor=672), (427, 640), (448, 672), (672, 672)),
        (PhotoInput(672, 672, fixed_size=(672, 600)), (427, 640), (672, 600), (672, 608)),
    ],
)
def test_sizes_of_inputs(
    photo_input: PhotoInput, size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    assert photo_input.size_of(*size) == resized
    assert photo_input.padded(*resized) == padded


@pytest.mark.parametrize("size", [(107, 160), (427, 640), (90, 30)])
def test_the_recipe_s_backbone_sees_squares_in_evaluation_and_training(size: tuple[int, int]) -> None:
    """Of the side that training crops have, whatever the photo's; not padded to 32 alone."""
    task = InstanceSegmentation(SMALL)
    model = task.build_model(create_backbone("swin_nano"))
    seen: list[tuple[int, ...]] = []
    task.backbone_of(model).register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    model.eval()([torch.rand(3, *size)] * 2)
    crop = torch.zeros(3, 107, 160, dtype=torch.uint8)
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 90.0, 80.0]]),
        "labels": torch.tensor([2]),
        "masks": torch.ones(1, 107, 160, dtype=torch.uint8),
    }
    task.losses(model.train(), ([crop], [target]), None)
    assert seen == [(2, 3, 160, 160), (1, 3, 160, 160)]
    assert SMALL.photo_input.size_of(107, 160) == (107, 160)


def test_padding_is_zero_after_normalisation() -> None:
    batch = to_input([torch.ones(3, 10, 20)], PADDED)
    assert batch.tensors.shape == (1, 3, 32, 32)
    assert torch.all(batch.tensors[:, :, 10:] == 0) and torch.all(batch.tensors[:, :, :, 20:] == 0)
    torch.testing.assert_close(
        batch.tensors[0, :, 0, 0],
        (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]),
    )


@pytest.mark.parametrize("size", [(24, 36), (7, 5), (13, 40), (26, 38), (52, 77), (13, 19), (1, 1)])
def test_uint8_resize_is_opencv_s_arithmetic(size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (2, 26, 38), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected = np.zeros((2, *size), dtype=np.uint8)
    for channel, row, column in np.ndindex(2, *size):
        expected[channel, row, column] = fixed_point(image[channel].numpy(), row, column, size)
    assert np.array_equal(resize_uint8(image, size).numpy(), expected)


def fixed_point(
    image: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], row: int, column: int, size: tuple[int, int]
) -> int:
    """A pixel of ``cv2.resize(image, …, interpolation=cv2.INTER_LINEAR)``, as its source computes it."""

    def neighbours(place: int, old: int, new: int, *, is_row: bool) -> tuple[int, int, int, int]:
        at = np.float32((place + 0.5) * (old / new) - 0.5)
        first = int(np.floor(at))
        share = np.float32(at - first)
        if not is_row and (first < 0 or first >= old - 1):
            share = np.float32(0)
        weights = (int(np.rint((np.float32(1) - share) * 2048)), int(np.rint(share * 2048)))
        return min(max(first, 0), old - 1), min(max(first + 1, 0), old - 1), *weights

    top, bottom, above, below = neighbours(row, image.shape[0], size[0], is_row=True)
    left, right, before, behind = neighbours(column, image.shape[1], size[1], is_row=False)
    lines = [int(image[y, left]) * before + int(image[y, right]) * behind for y in (top, bottom)]
    return (((above * (lines[0] >> 4)) >> 16) + ((below * (lines[1] >> 4)) >> 16) + 2) >> 2


@pytest.mark.parametrize("size", [(240, 360), (400, 267), (640, 427), (800, 1199)])
def test_a_photo_is_resized_as_opencv_does(size: tuple[int, int], tmp_path: Path) -> None:
    """To the last bit, smaller and larger, in all three colours."""
    root = write_drawn_photos(tmp_path / "photos")
    pixels, _ = CocoInstances(root, "val2017")[0]
    expected = cv2.resize(pixels.permute(1, 2, 0).numpy(), (size[1], size[0]))
    found = resize_uint8(pixels.as_subclass(Tensor), size)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


def test_anchors_are_exact_and_at_fixed_strides() -> None:
    sizes = [(6, 10), (3, 5), (2, 3), (1, 2), (1, 1)]
    batch = to_input([torch.rand(3, 21, 37)], PADDED)
    maps = [torch.zeros(1, 4, *size) for size in sizes]
    (found,) = StridedAnchors((32, 64, 128, 256, 512), Conventions())(batch, maps)
    expected = [
        oracle.anchor(level, ratio, row, column)
        for level, (height, width) in enumerate(sizes)
        for row in range(height)
        for column in range(width)
        for ratio in (0.5, 1.0, 2.0)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-6)
    (rounded,) = StridedAnchors((32, 64, 128, 256, 512), Conventions(rounded_anchors=True))(batch, maps)
    assert torch.equal(rounded[0], torch.tensor([-23.0, -11.0, 23.0, 11.0]))


def test_strides_must_be_one_per_level() -> None:
    config = replace(SMALL, conventions=Conventions(anchor_strides=(4, 8, 16, 32)))
    with pytest.raises(
        ValueError, match=r"anchor_strides must be one per level of the pyramid, 5, got \[4, 8"
    ):
        SparseMaskRCNN(create_backbone("swin_nano"), config)


REGIONS = [
    (3.2, 5.1, 30.7, 41.9),
    (0.0, 0.0, 60.0, 50.0),
    (10.5, 8.25, 126.0, 120.0),
    (90.0, 90.0, 95.0, 91.5),
]


@pytest.mark.parametrize("ratio", [0, 2])
def test_pooling_from_the_level_of_a_fixed_stride(ratio: int) -> None:
    """The level by the region's size, the scale by the stride; never by an image that was seen before."""
    generator = torch.Generator().manual_seed(0)
    maps = {str(i): torch.rand(1, 2, s, s, generator=generator) for i, s in enumerate((32, 16, 8, 4))}
    pool = PyramidPool((4, 8, 16, 32), 3, sampling_ratio=ratio, aligned=True)
    boxes = torch.tensor(REGIONS)
    found = pool(maps, [boxes], [(1, 1)])
    assert pool.levels(boxes).tolist() == [oracle.level_of(region) for region in REGIONS] == [0, 0, 1, 0]
    if ratio == 0:
        for region, pooled in zip(REGIONS, found, strict=True):
            level = oracle.level_of(region)
            expected = oracle.pool(maps[str(level)][0].double().numpy(), region, 4 * 2**level, 3)
            np.testing.assert_allclose(pooled.numpy(), expected, atol=1e-5)
    assert torch.equal(pool(maps, [boxes[:0], boxes[:2]][:1], [(7, 9)]), found[:0])


def test_the_middle_of_a_pixel_is_half_a_pixel_from_its_corner() -> None:
    """A plane that rises by one per pixel, pooled at a box about the middle of pixel (9, 5), is 5 there."""
    plane = {"0": torch.arange(32.0).expand(1, 1, 32, 32)}
    box = [torch.tensor([[20.0, 36.0, 24.0, 40.0]])]  # pixel 5, 9 of stride 4
    value = {
        aligned: float(PyramidPool((4,), 1, sampling_ratio=2, aligned=aligned)(plane, box, []).squeeze())
        for aligned in (True, False)
    }
    assert value == {True: pytest.approx(5.0), False: pytest.approx(5.5)}


def test_masks_are_sampled_onto_exact_boxes() -> None:
    masks = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(
        [[3.3, 2.1, 17.8, 12.9], [-4.0, -2.5, 9.0, 8.0], [15.0, 10.0, 40.0, 30.0], [5.0, 5.0, 5.4, 5.3]]
    )
    found = paste_masks(masks, boxes, (20, 24), "float")
    for pasted, mask, box in zip(found, masks, boxes.double().tolist(), strict=True):
        expected = oracle.paste(mask[0].double().numpy(), tuple(box), (20, 24))
        np.testing.assert_allclose(pasted[0].numpy(), expected, atol=2e-4)
    assert torch.equal(paste_masks(masks[:0], boxes[:0], (20, 24), "float"), torch.zeros(0, 1, 20, 24))


def test_integer_pasting_is_torchvision_s() -> None:
    masks = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3.3, 2.1, 17.8, 12.9], [-4.0, -2.5, 9.0, 8.0]])
    found = paste_masks(masks, boxes, (20, 24), "integer")
    assert torch.equal(found, paste_masks_in_image(masks, boxes, (20, 24)))
    assert not torch.allclose(found, paste_masks(masks, boxes, (20, 24), "float"))


def test_a_mask_of_no_width_covers_the_pixels_beside_it() -> None:
    """As in mmdet: places relative to no width are infinite, and are taken for the middle of the mask."""
    pasted = paste_masks(torch.ones(1, 1, 28, 28), torch.tensor([[5.0, 5.0, 5.0, 9.0]]), (12, 12), "float")
    expected = torch.zeros(1, 1, 12, 12)
    expected[..., 5:9, 4:6] = 1
    torch.testing.assert_close(pasted, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_detections_equal_mmdet_s_post_processing(seed: int) -> None:
    """The whole way after the backbone against loops over anchors, boxes, classes and pixels."""
    config = replace(
        SMALL, num_proposals=15, num_proposals_per_level=20, num_detections=6, score_threshold=0.2,
        input=PhotoInput(96, 64), conventions=Conventions(roi_sampling_ratio=0),
    )  # fmt: skip
    model = lively(config, seed)
    size, resized = (45, 60), (64, 85)
    photo = torch.rand(3, *resized, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        (found,) = model.detect([photo], [size])
        features = model.backbone(to_input([photo], config.photo_input).tensors)
        logits, offsets = model.rpn.head(list(features.values()))
        regions = oracle.proposals(
            [each[0].double().numpy() for each in logits],
            [each[0].double().numpy().reshape(3, 4, *each.shape[-2:]) for each in offsets],
            resized, per_level=20, in_all=15, threshold=0.7,
        )  # fmt: skip
        maps = [each[0].double().numpy() for each in features.values()]

        def pooled(boxes: list[oracle.Box], cells: int) -> Tensor:
            levels = [oracle.level_of(box) for box in boxes]
            return torch.from_numpy(
                np.stack(
                    [oracle.pool(maps[n], box, 4 * 2**n, cells) for n, box in zip(levels, boxes, strict=True)]
                )
            ).float()

        scores, boxes = model.roi_heads.box_predictor(model.roi_heads.box_head(pooled(regions, 7)))
        scale = (resized[1] / size[1], resized[0] / size[0])
        expected = oracle.detections(
            regions,
            torch.cat((scores[:, 1:], scores[:, :1]), dim=1).double().numpy(),  # mmdet's background is last
            boxes[:, 4:].double().numpy().reshape(len(regions), 3, 4),
            resized, scale, min_score=0.2, threshold=0.5, in_all=6,
        )  # fmt: skip
        assert len(expected) == len(found["boxes"]) > 0
        on_input = [
            (b[0] * scale[0], b[1] * scale[1], b[2] * scale[0], b[3] * scale[1]) for b, _, _ in expected
        ]
        masks = model.roi_heads.mask_predictor(model.roi_heads.mask_head(pooled(on_input, 14))).sigmoid()
    for index, (box, score, label) in enumerate(expected):
        torch.testing.assert_close(found["boxes"][index], torch.tensor(box), atol=1e-3, rtol=0)
        assert float(found["scores"][index]) == pytest.approx(score, abs=1e-5)
        assert int(found["labels"][index]) == label + 1
        pasted = oracle.paste(masks[index, label + 1].double().numpy(), box, size)
        np.testing.assert_allclose(found["masks"][index, 0].numpy(), pasted, atol=1e-3)


@pytest.mark.parametrize("others", [0, 1])
def test_a_photo_without_a_proposal_has_no_detection(others: int) -> None:
    """Of one image, or of all: a network that has diverged proposes nothing."""
    model = lively(SMALL)
    features = model.backbone(to_input([torch.rand(3, 64, 64)] * (1 + others), PADDED).tensors)
    regions = [torch.zeros(0, 4)] + [torch.tensor([[3.0, 3.0, 40.0, 50.0]])] * others
    with torch.inference_mode():
        found, losses = model.roi_heads(features, regions, [(64, 64)] * (1 + others))
    assert losses == {}
    assert {name: tuple(value.shape) for name, value in found[0].items()} == {
        "boxes": (0, 4), "scores": (0,), "labels": (0,), "masks": (0, 1, 28, 28),
    }  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        assert len(model([torch.rand(3, 50, 80)])[0]["boxes"]) == 0


def test_the_background_has_no_box_and_no_mask_and_never_learns_one() -> None:
    task = InstanceSegmentation(SMALL)
    model = task.build_model(create_backbone("swin_nano")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    boxes, masks = torch.tensor([[10.0, 10.0, 90.0, 80.0]]), torch.zeros(1, 160, 160, dtype=torch.uint8)
    masks[:, 10:80, 10:90] = 1
    target = {"boxes": boxes, "labels": torch.tensor([2]), "masks": masks}
    before = model.roi_heads.box_predictor.bbox_pred.weight.detach().clone()
    for _ in range(2):
        losses = task.losses(model, ([torch.full((3, 160, 160), 99, dtype=torch.uint8)], [target]), VECTOR)
        assert set(losses) == {
            "loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg",
        }  # fmt: skip
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    predictor = model.roi_heads.box_predictor.bbox_pred
    assert not torch.equal(predictor.weight[8:12], before[8:12])
    for values in (
        predictor.weight[:4],
        predictor.bias[:4],
        model.roi_heads.mask_predictor.mask_fcn_logits.weight[0],
    ):
        assert torch.all(values == 0)


def test_targets_of_masks_are_cut_as_features_are() -> None:
    model = lively(SMALL)
    mask = torch.zeros(1, 56, 56)
    mask[:, 14:42, 14:42] = 1
    cut = model.roi_heads._cut(mask, torch.tensor([[14.0, 14.0, 42.0, 42.0]]), torch.tensor([0]), 28)
    assert torch.equal(cut, torch.ones(1, 28, 28))
    half = model.roi_heads._cut(mask, torch.tensor([[0.0, 14.0, 28.0, 42.0]]), torch.tensor([0]), 28)
    torch.testing.assert_close(half[0, :, 13], torch.full((28,), 0.0))
    torch.testing.assert_close(half[0, :, 14], torch.full((28,), 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold must be between 0 and 1, got 1.5"),
        ({"num_detections": 0}, "num_detections must be a whole number of at least 1, got 0"),
        (
            {"conventions": {"mask_pasting": "round"}},
            "mask_pasting must be one of float, integer, got 'round'",
        ),
        (
            {"conventions": {"box_weights": [1, 1]}},
            r"box_weights are of x, y, width and height, got \[1, 1\]",
        ),
        (
            {"conventions": {"anchor_strides": [4, 0]}},
            r"anchor_strides must be positive numbers, got \[4, 0\]",
        ),
        ({"conventions": {"roi_sampling_ratio": -1}}, "roi_sampling_ratio must be at least 0, got -1"),
        ({"input": {"longest_side": 100, "shortest_side": 200}}, "the shortest no longer than the longest"),
        (
            {"input": {"longest_side": 9, "shortest_side": 9, "resize": "x"}},
            "resize must be one of float, uint8",
        ),
        (
            {"input": {"longest_side": 9, "shortest_side": 9, "fixed_size": [3]}},
            r"height and width, got \[3\]",
        ),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskRCNNConfig(**({"num_classes": 2} | change))  # type: ignore[arg-type]


def test_levels_beyond_the_strides_are_not_pooled() -> None:
    """However large a region is, the last level with a stride is the one."""
    maps = OrderedDict((str(level), torch.full((1, 1, 64, 64), float(level))) for level in range(5))
    pool = PyramidPool((4, 8, 16, 32), 2, sampling_ratio=2, aligned=True)
    sides = (55.0, 57.0, 113.0, 225.0, 449.0, 1800.0)
    pooled = pool(maps, [torch.tensor([[0.0, 0.0, side, side] for side in sides])], [])
    assert pooled.shape == (6, 1, 2, 2)
    assert pooled.amax(dim=(1, 2, 3)).tolist() == pooled.amin(dim=(1, 2, 3)).tolist() == [0, 0, 1, 2, 3, 3]
