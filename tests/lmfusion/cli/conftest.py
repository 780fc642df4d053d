"""The tiny chat model of the serving tests, for `lmfusion serve`."""

from tests.lmfusion.serving.conftest import model as model
