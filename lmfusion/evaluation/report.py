"""What did an evaluation find, for people? One HTML page: scores with intervals, tables, pictures, how to repeat it."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from lmfusion.evaluation.results import Picture, Score, SuiteResult, Table

_STYLE = """
:root { color-scheme: light dark; --line: #d5d5d5; --soft: #666; --code: #f3f3f3; --bar: #bcd0ea; --dot: #1f5fae; }
@media (prefers-color-scheme: dark) {
:root { --line: #3c3c3c; --soft: #a5a5a5; --code: #262626; --bar: #33496a; --dot: #8ab6f0; }
body { background: #151515; color: #e8e8e8; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: .75rem 0; } th, td { text-align: left; padding: .25rem .9rem .25rem 0;
vertical-align: top; border-bottom: 1px solid var(--line); } th { font-weight: 600; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; } .soft, small { color: var(--soft); } .details { font-size: .8rem; color: var(--soft);
overflow-wrap: anywhere; } figure { display: inline-block; margin: 0 .75rem .75rem 0; width: 8.5rem; font-size: .8rem;
vertical-align: top; overflow-wrap: anywhere; } figure img { width: 100%; display: block; }
figure.small img { image-rendering: pixelated; } figure.large { width: auto; display: block; }
figure.large img { width: auto; max-width: 100%; }
pre { background: var(--code); padding: .6rem .8rem; overflow-x: auto; } code { background: var(--code); }
summary { cursor: pointer; }
"""


SMALL, LARGE = 64, 256
"""Pixels a side: pictures up to the first are enlarged, above the second they have a line of the page of their own."""


def render_page(values: Mapping[str, Any], results: Sequence[SuiteResult], folder: Path) -> str:
    """The page of what eval.json holds. Pictures are files in `folder`, below one of its suite's name."""
    model = values["model"]
    base = model["base"]
    about = [
        ("model", model["path"]),
        ("sha256 of its weights and configuration", model["sha256"]),
        ("base LLM", "none" if base is None else f"{base['name']} ({base['dtype']}, sha256 {base['sha256']})"),
        ("parameters", f"{model['text_parameters']:,} text, {model['image_parameters']:,} image; {model['dtype']}"),
        ("lmfusion", f"{values['lmfusion']}, commit {values['commit'] or 'unknown'}"),
        ("sha256 of the settings", values["config_sha256"]),
        ("device", values["device"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in values["versions"].items())),
        ("date", values["date"]),
    ]
    for name, suite in values["suites"].items():
        made = suite["made"]
        about.append((name, f"{suite['seconds']:.0f} s on {made['device']}, {made['date']}, commit {made['commit']}"))
    again = f"<p>The same again:</p><pre>{html.escape(values['command'])}</pre>" if values["command"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>lmfusion eval: {html.escape(model["path"])}</title><style>{_STYLE}</style></head><body>
<h1>Evaluation</h1>
<p class="soft">{html.escape(model["path"])}. Brackets are 95 % bootstrap intervals over the samples: they tell how far
another sample of the same size would move the score, and nothing of another seed of training.</p>
{"".join(_suite(result, folder / result.suite) for result in results)}
<h2>What was evaluated</h2>
{again}
{_rows(about)}
</body></html>
"""


def _suite(result: SuiteResult, folder: Path) -> str:
    tables = "".join(_table(table) for table in result.tables)
    pictures = "".join(_figure(folder, picture) for picture in result.pictures)
    settings = [(name, str(value)) for name, value in result.settings.items()]
    return (
        f"<h2>{html.escape(result.suite.capitalize())}</h2>{_scores(result.scores)}{tables}"
        f"{f'<div>{pictures}</div>' if pictures else ''}"
        f"<details><summary>Settings</summary>{_rows(settings)}</details>"
    )


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    shared = _shared_details(scores)
    body = "".join(
        f'<tr><td>{html.escape(score.name)}</td><td class="number">{score.value:.4g}</td>'
        f'<td class="number">{_interval(score)}</td><td class="number">{score.count:,}</td>'
        f'<td class="details">{_details({k: v for k, v in score.details.items() if k not in shared})}</td></tr>'
        for score in scores
    )
    head = "<tr><th>score</th><th>value</th><th>95 % interval</th><th>samples</th><th>computed with</th></tr>"
    note = f'<p class="details">{_details(shared)}</p>' if shared else ""
    return f'<div class="wide"><table>{head}{body}</table></div>{note}'


def _shared_details(scores: Sequence[Score]) -> dict[str, Any]:
    """Details that stand with most scores, and always with one value: they are said once."""
    found: dict[str, list[Any]] = {}
    for score in scores:
        for name, value in score.details.items():
            found.setdefault(name, []).append(value)
    return {
        name: values[0]
        for name, values in found.items()
        if len(values) > max(1, len(scores) / 2) and all(value == values[0] for value in values)
    }


def _interval(score: Score) -> str:
    return "" if score.low is None or score.high is None else f"[{score.low:.4g}, {score.high:.4g}]"


def _details(details: Mapping[str, Any]) -> str:
    return html.escape("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in details.items()))


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'<h3>{html.escape(table.title)}</h3><div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th>{html.escape(a)}</th><td class="details">{html.escape(b)}</td></tr>' for a, b in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _figure(folder: Path, picture: Picture) -> str:
    caption = html.escape(picture.caption)
    source = quote(f"{folder.name}/{picture.file}")
    with Image.open(folder / picture.file) as image:
        side = max(image.size)
    size = "small" if side <= SMALL else "large" if side > LARGE else "middle"
    return (
        f'<figure class="{size}"><a href="{source}"><img loading="lazy" src="{source}" alt="{caption}"></a>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
