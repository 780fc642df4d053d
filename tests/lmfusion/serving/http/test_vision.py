"""Tests a server of a vision-language model: users' images keep their size, generated images go to the image tower."""

import contextlib

import numpy as np
import pytest

from tests.lmfusion.serving.conftest import Served, data_url, image_of, image_part
from tests.lmfusion.vlms import build, picture, save_vlm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(folder)
    return build(folder)


def test_the_answer_equals_that_of_the_engine(model):
    given, generated = picture(23, 9), picture(4, 4, seed=1)

    def conversation(as_part):
        return [
            {"role": "user", "content": [{"type": "text", "text": "draw"}]},
            {"role": "assistant", "content": [as_part(generated)]},
            {"role": "user", "content": [as_part(given), {"type": "text", "text": "and this"}]},
        ]

    expected = model.generate(
        [conversation(lambda image: {"type": "image", "image": image})],
        max_new_tokens=5,
        min_images=1,
        max_images=1,
        num_steps=2,
    )[0]
    with contextlib.closing(_Closing(model)) as served:
        body = served.answer(
            messages=conversation(lambda image: image_part(data_url(image))),
            max_tokens=5,
            min_images=1,
            max_images=1,
            num_steps=2,
        )
    parts = body["choices"][0]["message"]["parts"]
    [url] = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    assert np.array_equal(image_of(url), np.asarray(expected.images[0]))
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["usage"]["prompt_tokens"] == expected.num_prompt_tokens


class _Closing(Served):
    def close(self):
        self.stop()
