"""Average precision by the official COCO evaluation."""

import contextlib
import io
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor


def average_precision(
    ground_truth: COCO, results: list[dict[str, Any]], image_ids: list[int], kind: str
) -> tuple[float, dict[int, float]]:
    """COCO's AP, averaged over IoU 0.50 to 0.95, by the official evaluation; 0 without results.

    Returns:
        The mean over all categories, and the AP of every category that has ground truth.
    """
    if not results:
        wanted = set(image_ids)
        with_truth = {a["category_id"] for a in ground_truth.anns.values() if a["image_id"] in wanted}
        return 0.0, dict.fromkeys(sorted(with_truth), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), kind)
        evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # IoU thresholds, recalls, categories, areas (all), detections per image (most); -1 without truth
    precision_TRK = evaluation.eval["precision"][:, :, :, 0, -1]
    by_category = zip(evaluation.params.catIds, precision_TRK.mean(axis=(0, 1)).tolist(), strict=True)
    return float(evaluation.stats[0]), {category: ap for category, ap in by_category if ap >= 0}


def to_results(
    detections: dict[str, Tensor], image_id: int, category_ids: list[int], *, mask_threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Detections of one image, as torchvision's detectors give them, in COCO's result format.

    Args:
        category_ids: of the labels, from 1.
        mask_threshold: probability from which a pixel belongs to a mask.
    """
    boxes = detections["boxes"].float().cpu()
    corners_and_sizes = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), dim=1).tolist()
    columns = zip(
        corners_and_sizes, detections["scores"].tolist(), detections["labels"].tolist(), strict=True
    )
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, score, label in columns
    ]
    if "masks" in detections and results:
        masks = (detections["masks"][:, 0] >= mask_threshold).to("cpu", torch.uint8).numpy()
        encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        for result, mask in zip(results, encoded, strict=True):
            result["segmentation"] = mask
    return results
