"""The demo's report: one self-contained HTML page, and a picture of real and generated digits."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lmfusion.experiments.demo.chat_eval import Reply
from lmfusion.reports.charts import Line, Panel, line_charts
from lmfusion.reports.pages import ReportImage, data_uri, embedded, render_template
from lmfusion.synthetic.digits import name_with_article

CURVES = {
    "diffusion_loss": "diffusion loss (images)",
    "lm_loss": "language loss (text after images)",
    "boi_loss": "BOI loss (where an image begins)",
}
"""Charts of the training run, by key of metrics.jsonl."""
SMOOTHING = 0.9
"""Weight of the past in the running mean of a curve."""
CELL, GAP = 52, 24
"""Pixels of `digits_picture`: a digit with its margin, and the space between real and generated ones."""

Captioned = tuple[Image.Image, str, str]
"""An image, its reference caption, and the model's caption."""


def render_report(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, float]],
    real: Mapping[str, Sequence[Image.Image]],
    generated: Mapping[str, Sequence[Image.Image]],
    captions_right: Sequence[Captioned],
    captions_wrong: Sequence[Captioned],
    replies: Mapping[str, Sequence[Reply]],
    questions: Sequence[tuple[str, str, bool]],
    text_checks: Sequence[Sequence[Any]],
    times: Mapping[str, float],
) -> str:
    """The page.

    summary: the content of summary.json. metrics: the lines of metrics.jsonl. real, generated: images by name of the
    digit. replies: by title. questions: each with its answer, and whether the answer has no image. times: seconds.
    """
    cards = (
        ("generated images that the classifier reads as requested", f"{summary['digit_accuracy']:.0%}"),
        ("held-out images captioned right", f"{summary['caption_accuracy']:.0%}"),
        ("requests in a chat answered with the digit and its name", f"{summary['chat_accuracy']:.0%}"),
        ("the same, requested in other words", f"{summary['chat_accuracy_in_other_words']:.0%}"),
        ("text tower after training", "identical" if summary["text_identical"] else "CHANGED"),
        ("training", f"{summary['train_seconds']:.0f} s"),
    )
    details = [(name, value) for name, value in summary.items() if not isinstance(value, Mapping | list)]
    versions = [(f"version of {name}", version) for name, version in summary.get("versions", {}).items()]
    return render_template(
        "demo.html",
        summary=summary,
        cards=cards,
        generated=_image_rows(generated),
        real=_image_rows(real),
        conversations=[_conversation(title, of_title) for title, of_title in replies.items()],
        questions=[(question, answer, "none" if is_text else "GENERATED") for question, answer, is_text in questions],
        captions_right=[_captioned(*example) for example in captions_right],
        captions_wrong=[_captioned(*example) for example in captions_wrong],
        text_checks=text_checks,
        charts=loss_charts(metrics),
        times=list(times.items()),
        details=[*details, *versions],
    )


def loss_charts(metrics: Sequence[Mapping[str, float]]) -> list[ReportImage]:
    """A chart for each of CURVES: the logged values, and their running mean over them. None for less than two lines."""
    if len(metrics) < 2:
        return []
    steps = [line["step"] for line in metrics]
    charts = []
    for key, title in CURVES.items():
        values = [line[key] for line in metrics]
        lines = [
            Line("logged", steps, values, {"color": "#bcd0ea", "linewidth": 1.0}),
            Line("running mean", steps, _running_mean(values), {"color": "#1f5fae", "linewidth": 2.0}),
        ]
        [svg] = line_charts([Panel(title, lines)], panel_size=(4.6, 2.3))
        charts.append(ReportImage(data_uri("image/svg+xml", svg), title))
    return charts


def digits_picture(
    real: Mapping[str, Sequence[Image.Image]], generated: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """Three real digits above, five generated ones below, in a column per digit."""
    picture = Image.new("L", (CELL * len(real), CELL * 8 + GAP), 255)
    side = CELL - 4
    for first_row, offset, count, images in ((0, 0, 3, real), (3, GAP, 5, generated)):
        for column, examples in enumerate(images.values()):
            for row, image in enumerate(examples[:count]):
                large = image.convert("L").resize((side, side), Image.Resampling.NEAREST)
                picture.paste(large, (column * CELL + 2, (first_row + row) * CELL + offset + 2))
    return picture


def _running_mean(values: Sequence[float]) -> list[float]:
    means: list[float] = []
    for value in values:
        means.append(value if not means else SMOOTHING * means[-1] + (1 - SMOOTHING) * value)
    return means


def _image_rows(rows: Mapping[str, Sequence[Image.Image]]) -> list[tuple[str, list[ReportImage]]]:
    return [(name, [embedded(image, name) for image in images]) for name, images in rows.items()]


def _captioned(image: Image.Image, expected: str, written: str) -> ReportImage:
    is_right = expected == written
    return embedded(
        image,
        expected,
        caption=written or "(nothing)",
        verdict="right" if is_right else "wrong",
        note="" if is_right else f"expected: {expected}",
        size="small",
    )


def _conversation(title: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """A table with a row per wording of the request, and the replies to show in full: wrong ones, or else the first."""
    wordings = list(dict.fromkeys(_wording(reply) for reply in replies))
    rows = []
    for wording in wordings:
        of_wording = [reply for reply in replies if _wording(reply) == wording]
        images = [embedded(r.image, r.before + r.after) if r.image else None for r in of_wording]
        rows.append((wording, images, f"{sum(r.is_right for r in of_wording)} of {len(of_wording)}"))
    wrong = [reply for reply in replies if not reply.is_right]
    return {"title": title, "rows": rows, "shown": [_shown(reply) for reply in wrong or replies[:1]]}


def _wording(reply: Reply) -> str:
    """The request without its digit."""
    return reply.request.replace(name_with_article(reply.digit), "...")


def _shown(reply: Reply) -> dict[str, Any]:
    return {
        "request": reply.request,
        "before": reply.before,
        "image": embedded(reply.image, f"read as {reply.read_as}") if reply.image else None,
        "after": reply.after,
        "is_right": reply.is_right,
    }
