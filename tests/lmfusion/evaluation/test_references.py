"""Images and captions are read from COCO's and Karpathy's files, and from data sources."""

import json

import pytest

from lmfusion.data.config import SourceConfig
from lmfusion.evaluation.references import CocoConfig, References, check_references, load_references, read_coco
from tests.lmfusion.evaluation.coco_layout import NUM_IMAGES, save_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return save_coco(tmp_path_factory.mktemp("coco") / "coco")


def test_coco_captions(coco):
    found = read_coco(CocoConfig(str(coco / "annotations" / "captions_val2014.json"), str(coco / "val2014")))
    assert len(found) == NUM_IMAGES
    assert found[2].captions == tuple(f"Thing 2 seen in way {i}." for i in range(5))
    assert found[2].load_image().size == (24, 22)


def test_karpathys_split(coco):
    found = read_coco(CocoConfig(str(coco / "dataset_coco.json"), str(coco), "test"))
    assert [reference.sample_id for reference in found] == [f"val2014/COCO_val2014_{i:012d}.jpg" for i in range(4)]
    assert [len(reference.captions) for reference in found] == [5] * 4
    assert found[3].load_image().size == (24, 23)


def test_files_of_another_layout(coco, tmp_path):
    with pytest.raises(ValueError, match=r"must be one of restval, test, .* got None"):
        read_coco(CocoConfig(str(coco / "dataset_coco.json"), str(coco)))
    with pytest.raises(ValueError, match="has no splits, got 'test'"):
        read_coco(CocoConfig(str(coco / "annotations" / "captions_val2014.json"), str(coco), "test"))
    file = tmp_path / "x.json"
    for text in ("no JSON", "[]", "{}", json.dumps({"images": [{"id": 1}], "annotations": [{"image_id": 1}]})):
        file.write_text(text)
        with pytest.raises(ValueError, match="must hold COCO captions"):
            read_coco(CocoConfig(str(file), str(coco)))
    file.write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(ValueError, match="at least one image with captions, got none"):
        read_coco(CocoConfig(str(file), str(coco)))


def test_missing_files_are_named_with_where_to_get_them(coco, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"images\.coco\.annotations must be an existing file, got .*none\.json.*annotations_trainval2014\.zip",
    ):
        check_references(CocoConfig(str(tmp_path / "none.json"), str(coco)), "images")
    with pytest.raises(ValueError, match=r"captions\.coco\.images=PATH"):
        check_references(CocoConfig(str(coco / "dataset_coco.json"), str(tmp_path / "none")), "captions")


def test_no_image_comes_twice_before_all_have_come():
    references = load_references(SourceConfig("digits", split="test"), None, 8)
    size = len(references)
    sampled = references.sample(size + 5, seed=3)
    assert sorted(index for index, _ in sampled[:size]) == list(range(size))
    assert all(caption in references[index].captions for index, caption in sampled)
    assert references.sample(size, seed=3) == sampled[:size]
    assert references.sample(size, seed=4) != sampled[:size]


def test_each_caption_of_an_image_is_sampled_sometimes(coco):
    references = References(read_coco(CocoConfig(str(coco / "dataset_coco.json"), str(coco), "test")))
    assert len(set(references.sample(400, seed=0))) == 4 * 5


def test_conversations_are_not_references():
    references = load_references(SourceConfig("digit_conversations", split="test"), None, 8)
    with pytest.raises(ValueError, match="must hold images with captions"):
        references.sample(1, seed=0)
