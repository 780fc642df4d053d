"""What did the demo show? One self-contained HTML page: loss curves, real and drawn digits, captions, proof, times."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmfusion.experiments.demo.chat_eval import Reply
from lmfusion.synthetic.digits import name_with_article

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .25rem .9rem .25rem 0; vertical-align: top; }
th { font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.card { border: 1px solid #d5d5d5; border-radius: .5rem; padding: .6rem 1rem; }
.card b { display: block; font-size: 1.5rem; }
.grid img, figure img { image-rendering: pixelated; width: 40px; height: 40px; margin: 1px; }
figure { display: inline-block; margin: 0 .75rem .75rem 0; width: 8.5rem; font-size: .85rem; vertical-align: top; }
figure img { width: 64px; height: 64px; display: block; }
.talk { border-left: 3px solid #d5d5d5; padding: .1rem 1rem; margin: .5rem 0; } .talk img { image-rendering: pixelated;
width: 64px; height: 64px; display: block; } .talk b { font-weight: 600; }
.wrong { color: #b00020; } .right { color: #0a6b2d; } code { background: #f3f3f3; padding: 0 .25rem; }
svg text { font: 12px system-ui, sans-serif; fill: #555; }
"""


def image_tag(image: Image.Image, title: str) -> str:
    """An <img> that carries its pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" title="{html.escape(title)}" src="data:image/png;base64,{data}">'


def line_chart(x: Sequence[float], y: Sequence[float], label: str, width: int = 440, height: int = 220) -> str:
    """An SVG curve of y over x with the running mean drawn over the raw values."""
    if len(x) < 2:
        return ""
    left, right, top, bottom = 52, 12, 12, 34
    highest = max(y) or 1.0
    span = (x[-1] - x[0]) or 1

    def path(values: Sequence[float]) -> str:
        points = (
            f"{left + (width - left - right) * (a - x[0]) / span:.1f},"
            f"{top + (height - top - bottom) * (1 - v / highest):.1f}"
            for a, v in zip(x, values, strict=True)
        )
        return " ".join(points)

    smooth: list[float] = []
    for value in y:
        smooth.append(value if not smooth else 0.9 * smooth[-1] + 0.1 * value)
    base, end = height - bottom, width - right
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{html.escape(label)}">'
        f'<line x1="{left}" y1="{base}" x2="{end}" y2="{base}" stroke="#999"/>'
        f'<line x1="{left}" y1="{top}" x2="{left}" y2="{base}" stroke="#999"/>'
        f'<polyline fill="none" stroke="#bcd0ea" points="{path(y)}"/>'
        f'<polyline fill="none" stroke="#1f5fae" stroke-width="2" points="{path(smooth)}"/>'
        f'<text x="{left - 6}" y="{top + 8}" text-anchor="end">{highest:.3g}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{left}" y="{height - 10}">step {x[0]:g}</text>'
        f'<text x="{end}" y="{height - 10}" text-anchor="end">{x[-1]:g}</text>'
        f'<text x="{(left + end) / 2}" y="{height - 10}" text-anchor="middle">{html.escape(label)}</text></svg>'
    )


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """An HTML table; numbers are aligned right."""

    def cell(value: Any) -> str:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if is_number else str(value)
        return f'<td class="number">{text}</td>' if is_number else f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def image_rows(rows: Mapping[str, Sequence[Image.Image]]) -> str:
    """A grid with one labelled row of pictures a name."""
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{''.join(image_tag(image, name) for image in images)}</td></tr>"
        for name, images in rows.items()
    )
    return f'<table class="grid">{body}</table>'


def captioned(examples: Sequence[tuple[Image.Image, str, str]]) -> str:
    """Pictures with what the model wrote under them; examples are (image, expected, written)."""
    return "".join(
        f'<figure>{image_tag(image, expected)}<span class="{"right" if expected == written else "wrong"}">'
        f"{html.escape(written) or '(nothing)'}</span>"
        + ("" if expected == written else f"<br>expected: {html.escape(expected)}")
        + "</figure>"
        for image, expected, written in examples
    )


def conversations(replies: Sequence[Reply], title: str) -> str:
    """A table with a row a request and a picture a digit; below it what went wrong, in full, or the first reply."""
    requests = list(dict.fromkeys(_request_of(reply) for reply in replies))
    rows = {request: [reply for reply in replies if _request_of(reply) == request] for request in requests}
    body = "".join(
        f'<tr><td>{html.escape(request)}</td><td class="grid">'
        + "".join(image_tag(r.image, r.before + r.after) if r.image else "&#8709; " for r in of_request)
        + f'</td><td class="number">{sum(r.is_right for r in of_request)} of {len(of_request)}</td></tr>'
        for request, of_request in rows.items()
    )
    wrong = [reply for reply in replies if not reply.is_right]
    shown = "".join(_talk(reply) for reply in (wrong or replies)[: len(wrong) or 1])
    head = "<tr><th>asked</th><th>drawn</th><th>right</th></tr>"
    return f"<h3>{html.escape(title)}</h3><table>{head}{body}</table>{shown}"


def _request_of(reply: Reply) -> str:
    return reply.request.replace(name_with_article(reply.digit), "...")


def _talk(reply: Reply) -> str:
    picture = image_tag(reply.image, f"read as {reply.read_as}") if reply.image else ""
    kind = "right" if reply.is_right else "wrong"
    before, after = (f'<span class="{kind}">{html.escape(text)}</span>' for text in (reply.before, reply.after))
    return f'<div class="talk"><b>{html.escape(reply.request)}</b><br>{before}{picture}{after}</div>'


def render_picture(
    real: Mapping[str, Sequence[Image.Image]], drawn: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Real digits above, drawn ones below: a column a digit, three and five of each."""
    cell, gap, scale = 8 * 6 + 4, 24, 6
    picture = Image.new("L", (cell * len(real), cell * 8 + gap), 255)
    for first_row, offset, count, images in ((0, 0, 3, real), (3, gap, 5, drawn)):
        for column, examples in enumerate(images.values()):
            for row, image in enumerate(examples[:count]):
                large = image.convert("L").resize((8 * scale, 8 * scale), Image.Resampling.NEAREST)
                picture.paste(large, (column * cell + 2, (first_row + row) * cell + offset + 2))
    return picture


def render_report(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    real: Mapping[str, Sequence[Image.Image]],
    drawn: Mapping[str, Sequence[Image.Image]],
    captions_right: Sequence[tuple[Image.Image, str, str]],
    captions_wrong: Sequence[tuple[Image.Image, str, str]],
    replies: Mapping[str, Sequence[Reply]],
    questions: Sequence[tuple[str, str, bool]],
    text_checks: Sequence[Sequence[Any]],
    times: Mapping[str, float],
) -> str:
    """The page. `summary` is what summary.json holds, `metrics` the lines of metrics.jsonl, `times` seconds.

    replies: by title; questions: each with its answer, and whether it came without an image.
    """
    steps = [m["step"] for m in metrics]
    curves = "".join(
        line_chart(steps, [m[key] for m in metrics], label)
        for key, label in (
            ("diffusion_loss", "diffusion loss (images)"),
            ("lm_loss", "language loss (text after images)"),
            ("boi_loss", "loss of the decision to begin an image"),
        )
    )
    verdict = "identical" if summary["text_identical"] else "CHANGED"
    cards = (
        ("drawings the judge reads as asked", f"{summary['digit_accuracy']:.0%}"),
        ("held-out images captioned right", f"{summary['caption_accuracy']:.0%}"),
        ("requests in a chat answered with the digit and its name", f"{summary['chat_accuracy']:.0%}"),
        ("the same, asked for in other words", f"{summary['chat_accuracy_in_other_words']:.0%}"),
        ("text side after training", verdict),
        ("training", f"{summary['train_seconds']:.0f} s"),
    )
    card_html = "".join(f'<div class="card"><b>{html.escape(v)}</b>{html.escape(k)}</div>' for k, v in cards)
    details = [(k, v) for k, v in summary.items() if not isinstance(v, Mapping | list)]
    versions = [(f"version of {k}", v) for k, v in summary.get("versions", {}).items()]
    wrong = captioned(captions_wrong) if captions_wrong else "<p>None.</p>"
    plain = [(question, answer, "none" if is_plain else "DRAWN") for question, answer, is_plain in questions]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>lmfusion demo</title><style>{_STYLE}</style></head><body>
<h1>A frozen language model that learned to draw</h1>
<p>{html.escape(summary["model"])} was given an image tower of {summary["trainable_parameters"]:,} parameters, trained
on {summary["train_images"]:,} handwritten digits with captions in words. Its {summary["text_parameters"]:,} text
parameters were frozen. The pictures and captions below come from the trained model;
{summary["held_out_images"]:,} digits were held out and used once, for this page.</p>
<div class="cards">{card_html}</div>
<h2>Drawn from captions</h2>
<p>A support vector machine trained on the real training digits judges the drawings.</p>
{image_rows(drawn)}
<h2>Real digits, for comparison</h2>
{image_rows(real)}
<h2>EngineRequest for in a chat</h2>
<p>The language model opens its answer in its own words. The image side decides where an image begins, draws it, and the
answer goes on: right is text, a picture that the judge reads as asked, and text that names this digit and no other. All
of it in greedy decoding.</p>
{"".join(conversations(of_kind, title) for title, of_kind in replies.items())}
<h3>Questions, with images allowed</h3>
{table(plain, ("question", "answer, in the language model's words", "image"))}
<h2>Captions of held-out images</h2>
<h3>Right</h3>{captioned(captions_right)}
<h3>Wrong</h3>{wrong}
<h2>Is the text side unchanged?</h2>
{table(text_checks, ("check", "result", "detail"))}
<h2>Training</h2>
{curves}
<h2>Times</h2>
{table([(name, seconds) for name, seconds in times.items()], ("stage", "seconds"))}
<h2>Details</h2>
{table([*details, *versions])}
</body></html>
"""
