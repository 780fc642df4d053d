"""A model of random weights to run suites on, and a cache for the data sets that tests make."""

import pytest

from lmfusion import LMFusion


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama, tmp_path_factory):
    """Folder of a random model that generates grey 8 x 8 images."""
    model = LMFusion.from_llm(
        tiny_llama,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear", "patch_size": 4}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
    )
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return LMFusion.from_pretrained(tiny_folder).eval()


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Data sets are prepared below tmp_path, not in the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
