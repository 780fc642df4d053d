"""The stages of the demo, from the base LLM to the report."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmfusion.evaluation.identity import versions
from lmfusion.experiments.demo.chat_eval import (
    UNSEEN_REQUESTS,
    Reply,
    answer_questions,
    openings_as_taught,
    request_digits,
)
from lmfusion.experiments.demo.report import digits_picture, render_report
from lmfusion.model.modeling import LMFusion
from lmfusion.model.verification import verify
from lmfusion.reports.charts import check_matplotlib
from lmfusion.reports.pictures import save_picture
from lmfusion.synthetic.digit_classifier import DigitClassifier, images_of
from lmfusion.synthetic.digits import NAMES, REQUESTS, Digits, caption_of
from lmfusion.training.config import load_config
from lmfusion.training.trainer import Trainer
from lmfusion.utils.devices import device_name
from lmfusion.utils.files import replace_text

IMAGES_PER_DIGIT = 10
SAMPLING = {"sampler": "dpm-solver", "num_steps": 20, "guidance_scale": 2.0, "seed": 0, "batch_size": 100}
NUM_SHOWN = 24
"""Number of right and of wrong captions in the report."""
PACKAGES = ("lmfusion", "torch", "transformers", "diffusers", "scikit-learn", "numpy")


def run_demo(output: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run all stages, write report.html, summary.json and digits.png into `output`, and return the summary.

    overrides: changes to recipes/digits.yaml, as for `lmfusion train`. The held-out digits are used once, for the
    captions of the report.
    """
    check_matplotlib("the demo's report")
    folder = Path(output)
    config = load_config(_recipe(), [*overrides, f"output={folder / 'run'}"])
    times: dict[str, float] = {}
    with _stage("adapt", times):
        trainer = Trainer(config)
    model = trainer.model
    num_trained = sum(weight.numel() for weight in trainer.weights.values())
    num_digits = len(Digits("train"))
    print(f"{num_trained / 1e6:.1f} M parameters to train on {num_digits} digits, on {model.device}")
    if trainer.step:
        print(f"continuing from step {trainer.step} in {trainer.folder}; delete that folder to train again")
    with _stage("train", times):
        is_finished = trainer.run()
    if not is_finished:
        raise SystemExit("interrupted; the same command continues")
    metrics = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    num_images, train_seconds = metrics[-1]["num_samples"], _train_seconds(metrics)

    # The report shows the saved model, loaded as a user would load it
    model = LMFusion.from_pretrained(trainer.folder / "model").to(model.device)  # type: ignore[arg-type]
    classifier = DigitClassifier()
    with _stage("generate", times):
        requested = [digit for digit in range(10) for _ in range(IMAGES_PER_DIGIT)]
        images = model.draw([caption_of(digit) for digit in requested], **SAMPLING)
    num_right = sum(read == digit for read, digit in zip(classifier.classify(images), requested, strict=True))
    with _stage("caption", times):
        held_out = Digits("test")
        held_out_images = images_of(held_out)
        written = model.caption(held_out_images, max_new_tokens=8, batch_size=64)
    expected = [caption_of(digit) for digit in held_out.labels]
    examples = list(zip(held_out_images, expected, written, strict=True))
    right = [example for example in examples if example[1] == example[2]]
    wrong = [example for example in examples if example[1] != example[2]]
    with _stage("chat", times):
        in_training_words = request_digits(model, classifier, REQUESTS, **SAMPLING)
        in_other_words = request_digits(model, classifier, UNSEEN_REQUESTS, **SAMPLING)
        questions = answer_questions(model)
        openings = openings_as_taught(model)
    with _stage("verify", times):
        verification = verify(trainer.folder / "model")
    print(verification.table())

    summary: dict[str, Any] = {
        "model": Path(verification.base).name,
        "text_identical": verification.text_identical,
        "digit_accuracy": num_right / len(requested),
        "caption_accuracy": len(right) / len(examples),
        "chat_accuracy": _share_right(in_training_words),
        "chat_accuracy_in_other_words": _share_right(in_other_words),
        "answers_without_image": sum(is_plain for _, _, is_plain in questions) / len(questions),
        "openings_as_taught": openings,
        "train_seconds": round(train_seconds, 3),
        "images_per_second": round(num_images / train_seconds, 1),
        "text_parameters": sum(p.numel() for p in model.text.parameters()),
        "trainable_parameters": num_trained,
        "train_images": num_digits,
        "held_out_images": len(examples),
        "steps": config.train.num_steps,
        "device": device_name(model.device),
        "versions": versions(PACKAGES),
    }
    training = Digits("train")
    real = _by_digit(images_of(training), training.labels)
    generated = _by_digit(images, requested)
    page = render_report(
        summary,
        metrics,
        real,
        generated,
        captions_right=right[:NUM_SHOWN],
        captions_wrong=wrong[:NUM_SHOWN],
        replies={"In the words of the training data": in_training_words, "In other words": in_other_words},
        questions=questions,
        text_checks=_text_checks(verification),
        times={stage: round(seconds, 1) for stage, seconds in times.items()},
    )
    save_picture(digits_picture(real, generated), folder / "digits.png")
    replace_text(folder / "report.html", page)
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    print(f"open {folder / 'report.html'}")
    return summary


def _recipe() -> Path:
    here = Path(__file__).resolve().parents[3] / "recipes" / "digits.yaml"
    if not here.is_file():
        raise ValueError(
            "the demo must run from a checkout of lmfusion, whose recipes/digits.yaml it reads, got none; clone it and "
            "install it with -e"
        )
    return here


@contextmanager
def _stage(name: str, times: dict[str, float]) -> Iterator[None]:
    print(f"== {name}", flush=True)
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start


def _train_seconds(metrics: Sequence[dict[str, Any]]) -> float:
    """Seconds of training steps, summed over all runs if training was interrupted."""
    counts = [0, *(line["num_samples"] for line in metrics)]
    return sum((b - a) / line["images_per_second"] for (a, b), line in zip(pairwise(counts), metrics, strict=True))


def _share_right(replies: Sequence[Reply]) -> float:
    return sum(reply.is_right for reply in replies) / len(replies)


def _by_digit(images: Sequence[Any], digits: Sequence[int]) -> dict[str, list[Any]]:
    return {
        name: [image for image, shown in zip(images, digits, strict=True) if shown == digit][:IMAGES_PER_DIGIT]
        for digit, name in enumerate(NAMES)
    }


def _text_checks(verification: Any) -> list[tuple[str, str, str]]:
    same = verification.num_tensors - len(verification.changed)
    rows = [("sha256 of text tensors", "identical" if not verification.changed else "CHANGED",
             f"{same} of {verification.num_tensors}")]  # fmt: skip
    for check in verification.prompts:
        detail = f"{check.num_tokens} tokens; at most {check.max_difference:.1g} from transformers' implementation"
        rows.append(
            (f"logits of {check.prompt.splitlines()[0]!r}", "identical" if check.identical else "CHANGED", detail)
        )
    return rows
