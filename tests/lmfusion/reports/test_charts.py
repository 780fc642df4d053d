"""Charts show what they are given, and are the same bytes each time."""

import subprocess
import sys

import pytest

from lmfusion.reports.charts import Line, Panel, check_matplotlib, line_charts

pytest.importorskip("matplotlib")
NAMES = ["first", "_hidden", "a$b$ <c> & d"]
PANELS = [
    Panel(f"Title {i}", [Line(name, [0, 5, 10], [3.0, 2.0, i], {"marker": "o"}) for name in NAMES]) for i in range(3)
]


def test_panels_titles_and_every_name_of_the_legend():
    [svg] = line_charts(PANELS, title="The <whole>", num_columns=2, legend_columns=2)
    text = svg.decode()
    assert all(f">{word}<" in text for word in ("Title 0", "Title 2", "steps", "first", "_hidden"))
    assert ">a$b$ &lt;c&gt; &amp; d<" in text and ">The &lt;whole&gt;<" in text
    [without] = line_charts(PANELS)
    assert b"first" not in without


def test_no_panels_are_an_empty_picture():
    svg, png = line_charts([], ("svg", "png"), title="Nothing yet", legend_columns=2)
    assert b"Nothing yet" in svg and png.startswith(b"\x89PNG")


def test_the_same_bytes_in_every_process():
    code = (
        "import hashlib; from lmfusion.reports.charts import Line, Panel, line_charts\n"
        "charts = line_charts([Panel('t', [Line('a', [0, 1], [1, 2])])], ('svg', 'png'), legend_columns=1)\n"
        "print([hashlib.sha256(chart).hexdigest() for chart in charts])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""
    assert b"<dc:date>" not in line_charts(PANELS)[0]


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the report needs matplotlib, which is not installed; pip install matplotlib"):
        check_matplotlib("the report")
