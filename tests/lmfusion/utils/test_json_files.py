"""Reading JSON objects: errors name the file, and files that lmfusion wrote are read strictly."""

import pytest

from lmfusion.utils.json_files import parse_json_object, read_json_object


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' is given twice"),
        ('{"a": NaN}', "numbers must be finite, got NaN"),
        ('{"a": -Infinity}', "numbers must be finite, got -Infinity"),
    ],
)
def test_only_strict_reading_refuses_duplicates_and_constants(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json is damaged: {message}; copy it again"):
        read_json_object(tmp_path / "a.json")
    assert "a" in read_json_object(tmp_path / "a.json", strict=False)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "it must hold a JSON object, got list"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b"{", "Expecting"),
        (b"\xff\xff{}", "decode"),
    ],
)
def test_anything_but_an_object_is_refused(tmp_path, content, message, strict):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json is damaged: .*{message}"):
        read_json_object(tmp_path / "a.json", strict=strict)
    with pytest.raises(ValueError, match=message):
        parse_json_object(content, strict=strict)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.json is missing"):
        read_json_object(tmp_path / "a.json")
