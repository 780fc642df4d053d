"""Tests the load test: it finds different answers, growing memory and broken streams; and a short run."""

import sys

import numpy as np
import pytest

from benchmarks.serving import load as serve_load
from benchmarks.serving.clients import SHARES, build_pool, read_stream
from benchmarks.serving.load import Equality, compare, growth_of, read_metrics
from tests.lmfusion.serving.conftest import data_url, picture

PIXELS = np.full((2, 2), 7, np.uint8)


@pytest.mark.parametrize(
    ("answer", "num_different", "num_close"),
    [
        ((["a", PIXELS, "b"], "stop"), 0, 0),
        ((["a", PIXELS + 1, "b"], "stop"), 0, 1),
        ((["a", PIXELS + 2, "b"], "stop"), 1, 0),
        ((["a", PIXELS[:1], "b"], "stop"), 1, 0),
        ((["a", PIXELS, "c"], "stop"), 1, 0),
        ((["a", PIXELS], "stop"), 1, 0),
        ((["a", "b", PIXELS], "stop"), 1, 0),
        ((["a", PIXELS, "b"], "length"), 1, 0),
    ],
)
def test_answers_that_differ_are_found(answer, num_different, num_close):
    counts = Equality()
    compare([answer, (["a", PIXELS, "b"], "stop")], (["a", PIXELS, "b"], "stop"), counts)
    assert (counts.num_answers, counts.num_different, counts.num_close_images) == (2, num_different, num_close)


def test_growth_is_that_of_the_last_quarter_over_the_second():
    assert growth_of([50, 50, 100, 100, 105, 105, 110, 110]) == pytest.approx(0.1)
    assert growth_of([10, 80, 100, 100, 100, 100, 100, 100]) == 0


def test_streams_are_read_to_their_end(server):
    chunks = [str(i) for i in range(3)]
    with pytest.raises(ValueError, match="broke off after 3 chunks"):
        read_stream(chunks)
    with pytest.raises(ValueError, match="the stream has an error: no"):
        read_stream(['{"error": {"message": "no"}}', "[DONE]"])
    url = data_url(picture())
    parts, reason = read_stream(
        [
            '{"choices": [{"delta": {"content": "a"}, "finish_reason": null}]}',
            '{"choices": [{"delta": {"content": "b"}, "finish_reason": null}]}',
            f'{{"choices": [{{"delta": {{"image": {{"event": "preview", "url": "{url}"}}}}, "finish_reason": null}}]}}',
            f'{{"choices": [{{"delta": {{"image": {{"event": "end", "url": "{url}"}}}}, "finish_reason": null}}]}}',
            '{"choices": [{"delta": {}, "finish_reason": "stop"}]}',
            "[DONE]",
        ]
    )
    assert reason == "stop" and parts[0] == "ab" and len(parts) == 2
    np.testing.assert_array_equal(parts[1], np.asarray(picture()))
    assert read_metrics(server.client.get("/metrics").text)["engine_up"] == 1


def test_the_pool_has_every_kind_and_is_the_same_each_time():
    pool = build_pool(10, 8)
    assert pool == build_pool(10, 8) and {asked.kind for asked in pool} == set(SHARES)
    assert {asked.status for asked in pool} == {200, 400, 404, 413}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_short_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "found.json"
    arguments = ["serve_load", "--clients", "8", "--seconds", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(serve_load, "MAX_GROWTH", 1.0)  # a server that has just been started still grows
    assert serve_load.main() == 0
    assert "all checks passed" in capsys.readouterr().out and '"num_different": 0' in output.read_text()
