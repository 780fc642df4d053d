"""A few images and captions as COCO and Karpathy lay them out."""

import json

import numpy as np
from PIL import Image

NUM_IMAGES = 6


def save_coco(folder):
    """`folder`, with annotations/captions_val2014.json, dataset_coco.json and val2014/*.jpg. Of Karpathy's split the
    first four are "test"."""
    generator = np.random.default_rng(0)
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations, karpathy = [], [], []
    for i in range(NUM_IMAGES):
        name = f"COCO_val2014_{i:012d}.jpg"
        pixels = generator.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "val2014" / name)
        captions = [f"Thing {i} seen in way {j}. " for j in range(5)]
        images.append({"id": 100 + i, "file_name": name, "height": 20 + i, "width": 24})
        annotations += [{"id": 10 * i + j, "image_id": 100 + i, "caption": text} for j, text in enumerate(captions)]
        sentences = [{"raw": text, "imgid": i, "tokens": text.lower().split()} for text in captions]
        split = "test" if i < 4 else "restval"
        karpathy.append({"filepath": "val2014", "filename": name, "imgid": i, "split": split, "sentences": sentences})
    (folder / "annotations" / "captions_val2014.json").write_text(
        json.dumps({"info": {}, "images": images, "annotations": annotations})
    )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    return folder
