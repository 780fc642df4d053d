"""Reports show values as text, whatever they contain, and need no other file."""

import base64
import io

import pytest
from jinja2 import UndefinedError
from PIL import Image

from lmfusion.reports.pages import (
    Cell,
    ReportImage,
    _environment,
    as_cell,
    embedded,
    markdown_cell,
    render_template,
)

HOSTILE = "</td><script>alert('x')</script>\"&amp;"
ESCAPED = "&lt;/td&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&#34;&amp;amp;"


def macro(call, **values):
    """The text of a call of a macro for HTML."""
    source = '{% from "macros.html" import image_tag, picture_grid, table %}{{ ' + call + " }}"
    environment = _environment().overlay(autoescape=True)
    return environment.from_string(source).render(**values)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (1234, ("number", "1,234")),
        (1234.5678, ("number", "1,235")),
        (0.123456, ("number", "0.1235")),
        (float("nan"), ("number", "nan")),
        (True, ("", "True")),
        (None, ("", "None")),
        ("12", ("", "12")),
        (Cell("[1, 2]", "number"), ("number", "[1, 2]")),
        ([None], ("images", [None])),
    ],
)
def test_numbers_are_aligned_right_and_text_is_not(value, cell):
    assert as_cell(value) == cell


def test_a_table_escapes_its_cells_and_headers():
    page = macro("table(rows, header)", rows=[(HOSTILE, 1234), (Cell(HOSTILE, "details"), [])], header=(HOSTILE, "n"))
    assert "<script" not in page
    assert page.count(ESCAPED) == 3
    assert '<td class="number">1,234</td>' in page
    assert f'<td class="details">{ESCAPED}</td>' in page
    assert page.count("<tr>") == 3


def test_a_table_may_have_headers_of_rows_and_images():
    image = ReportImage("a.png", HOSTILE)
    page = macro("table(rows, row_headers=true)", rows=[("name", [image, None])])
    assert "<th>name</th>" in page
    assert page.count("<img") == 1 and "∅" in page
    assert f'alt="{ESCAPED}"' in page and "<script" not in page


def test_a_grid_shows_captions_verdicts_and_links():
    images = [ReportImage(f'a"b{i}.png', "title", HOSTILE, "wrong", f"expected: {HOSTILE}", "small") for i in range(2)]
    page = macro("picture_grid(images, linked=true)", images=images)
    assert page.count("<figure") == page.count('<span class="wrong">') == page.count("<a href=") == 2
    assert page.count(ESCAPED) == 4 and "<script" not in page
    assert 'src="a&#34;b1.png"' in page
    assert "<a href" not in macro("picture_grid(images)", images=images)


def test_an_embedded_image_has_its_pixels():
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    source = embedded(image, "title").source
    content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(content)).tobytes() == image.tobytes()


def test_markdown_cells_stay_in_their_cell():
    assert markdown_cell("a | b\nc") == r"a \| b c"
    values = {"title": "<T>", "header": ["a|b"], "rows": [["x\ny"]], "start": "s", "claims": []}
    assert render_template("ablation.md", **values) == "# <T>\n\n| a\\|b |\n| --- |\n| x y |\n\ns\n"


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="title"):
        render_template("ablation.md", header=[], rows=[], start="", claims=[])
