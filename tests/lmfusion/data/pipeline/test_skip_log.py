"""What was left out is named once, counted over all ranks, and stops the run when it is too much; resumed or not."""

import json

import pytest

from lmfusion.data.pipeline.documents import SkippedSample
from lmfusion.data.pipeline.skip_log import SkipLog


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "damaged.jsonl"


def test_each_sample_has_a_line_a_time_and_is_printed_once(path, capsys):
    log = SkipLog(path, 0.5)
    log.add(1, 100, [SkippedSample("a", "torn"), SkippedSample("b", "no image")])
    log.add(2, 100, [])
    log.add(3, 100, [SkippedSample("a", "torn")])
    assert lines(path) == [
        {"step": 1, "sample_id": "a", "reason": "torn"},
        {"step": 1, "sample_id": "b", "reason": "no image"},
        {"step": 3, "sample_id": "a", "reason": "torn"},
    ]
    assert capsys.readouterr().err == "skipped, damaged: a: torn\nskipped, damaged: b: no image\n"
    assert log.state() == {"num_samples": 300, "num_damaged": 3}
    log.close()


def test_nothing_is_written_without_damage(path):
    log = SkipLog(path, 0.0)
    log.add(1, 10**6, [])
    assert log.state() == {"num_samples": 10**6, "num_damaged": 0} and not path.exists()


def test_too_much_damage_stops_and_names_the_last(path):
    log = SkipLog(path, 0.01)
    for step in range(5):
        log.add(step, 50, [SkippedSample(f"s/{step}{i}", "torn") for i in range(2)])  # 10 of 250: early, 10 of 1,000
    message = (
        r"at most data\.max_damaged, 0\.01, got 11 of 300 samples; repair them, or raise data\.max_damaged\. The last: "
        r"s/40: torn; s/41: torn; s/9: half a file\. Earlier ones are in .*damaged\.jsonl"
    )
    with pytest.raises(ValueError, match=message):
        log.add(5, 50, [SkippedSample("s/9", "half a file")])
    assert lines(path)[-1]["sample_id"] == "s/9"


@pytest.mark.parametrize(("num_damaged", "is_allowed"), [(50, True), (51, False)])
def test_the_share_is_exact(path, num_damaged, is_allowed):
    log = SkipLog(path, 0.01)
    damaged = [SkippedSample(str(i), "torn") for i in range(num_damaged)]
    if is_allowed:
        log.add(1, 5000, damaged)
    else:
        with pytest.raises(ValueError, match="51 of 5000"):
            log.add(1, 5000, damaged)


def test_ranks_count_together_and_stop_together(path):
    logs = [SkipLog(path.with_name(f"{rank}.jsonl"), 0.002) for rank in range(2)]
    found = [[SkippedSample("a", "torn"), SkippedSample("b", "torn")], []]
    for log, damaged in zip(logs, found, strict=True):
        log.add(1, 1000, damaged, num_damaged=2)
    assert logs[0].state() == logs[1].state() == {"num_samples": 1000, "num_damaged": 2}
    for log in logs:
        with pytest.raises(ValueError, match="3 of 1001 samples"):
            log.add(2, 1, [], num_damaged=1)
    assert not path.with_name("1.jsonl").exists()


def test_resume_forgets_later_steps_and_continues_counting(path):
    log = SkipLog(path, 0.01)
    log.add(1, 600, [SkippedSample("a", "torn")])
    log.add(2, 600, [SkippedSample("b", "torn")])
    state = json.loads(json.dumps(log.state()))
    log.add(3, 600, [SkippedSample("c", "torn")])
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "sam')  # a kill in the middle of a line
    resumed = SkipLog(path, 0.01)
    resumed.resume(2, state)
    assert [line["sample_id"] for line in lines(path)] == ["a", "b"]
    resumed.add(3, 600, [SkippedSample("c", "torn")])
    assert [line["sample_id"] for line in lines(path)] == ["a", "b", "c"]
    assert resumed.state() == log.state() == {"num_samples": 1800, "num_damaged": 3}
    with pytest.raises(ValueError, match="19 of 1810"):
        resumed.add(4, 10, [SkippedSample(str(i), "torn") for i in range(16)])


def test_a_run_that_begins_again_forgets_all(path):
    log = SkipLog(path, 0.01)
    log.add(1, 600, [SkippedSample("a", "torn")])
    log.close()
    again = SkipLog(path, 0.01)
    again.resume(0, {})
    assert lines(path) == [] and again.state() == {"num_samples": 0, "num_damaged": 0}


def test_a_run_that_saw_nothing_stops_whatever_share_is_allowed(path):
    log = SkipLog(path, 1.0)
    log.add(1, 999, [], num_damaged=999)
    with pytest.raises(ValueError, match="all 999 samples read so far are damaged, and nothing was learned"):
        log.check_any_good()
    with pytest.raises(ValueError, match=r"all 1000 samples .* run `lmfusion data check` .* The last: a: torn"):
        log.add(2, 1, [SkippedSample("a", "torn")])
    other = SkipLog(path, 1.0)
    other.check_any_good()
    other.add(1, 2000, [], num_damaged=1999)
    other.check_any_good()


def test_names_cannot_move_the_cursor_or_break_a_line(path, capsys):
    log = SkipLog(path, 0.0)
    evil = SkippedSample("a\x1b[2J\nfine: b", "no\r\x1b]0;title\x07 " + "x" * 5000)
    with pytest.raises(ValueError, match=r"at most data\.max_damaged") as caught:
        log.add(1, 5, [evil])
    for shown in (capsys.readouterr().err, f"{caught.value}\n"):
        assert shown.count("\n") == 1 and shown[:-1].isprintable() and len(shown) < 3000
        assert "a\\x1b[2J\\nfine: b: no\\r\\x1b]0;title\\x07 xxx" in shown
    assert lines(path)[0]["sample_id"] == evil.sample_id  # the file has it as it is
