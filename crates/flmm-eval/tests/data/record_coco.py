"""Records coco.json: COCO mask statistics of random predictions, from pycocotools.

    pip install pycocotools
    python record_coco.py > coco.json
"""

import json
import random
import sys

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

random.seed(5)
rng = np.random.default_rng(5)


def blob(height, width, base=None):
    """A random ellipse, or one near `base`."""
    if base is None:
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        ry, rx = rng.uniform(2, height / 2), rng.uniform(2, width / 2)
    else:
        cy, cx, ry, rx = (v * rng.uniform(0.85, 1.15) for v in base)
    y, x = np.mgrid[:height, :width]
    return (cy, cx, ry, rx), (((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1)


def encode(mask):
    rle = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode()}


cases = []
for case in range(6):
    # Scores: all equal, few distinct ones, or random.
    levels = [1, 1, 4, 4, 0, 0][case]
    images, truth, predicted = [], [], []
    for image_id in range(1, 9):
        height, width = (int(v) for v in rng.integers(20, 140, 2))
        images.append({"id": image_id, "height": height, "width": width})
        shapes = [blob(height, width) for _ in range(rng.integers(0, 6))]
        for _, mask in shapes:
            truth.append((image_id, mask))
        for _ in range(rng.integers(0, 9)):
            base = random.choice(shapes)[0] if shapes and rng.random() < 0.7 else None
            score = 1.0 if levels == 1 else float(rng.integers(1, levels + 1)) / levels if levels else float(rng.random())
            predicted.append((image_id, blob(height, width, base)[1], score))
    gt = COCO()
    gt.dataset = {
        "images": images,
        "categories": [{"id": 1}],
        "annotations": [
            {"id": i + 1, "image_id": image, "category_id": 1, "iscrowd": 0, "area": float(mask.sum()), "segmentation": encode(mask)}
            for i, (image, mask) in enumerate(truth)
        ],
    }
    stdout, sys.stdout = sys.stdout, sys.stderr
    gt.createIndex()
    dt = gt.loadRes(
        [{"image_id": image, "category_id": 1, "segmentation": encode(mask), "score": score} for image, mask, score in predicted]
    )
    evaluation = COCOeval(gt, dt, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    sys.stdout = stdout
    cases.append(
        {
            "images": [
                {
                    "true": [encode(mask) for image, mask in truth if image == info["id"]],
                    "predicted": [encode(mask) for image, mask, _ in predicted if image == info["id"]],
                    "scores": [score for image, _, score in predicted if image == info["id"]],
                }
                for info in images
            ],
            "stats": list(evaluation.stats),
        }
    )
json.dump(cases, sys.stdout, separators=(",", ":"))
