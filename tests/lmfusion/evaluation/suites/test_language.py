"""Do tasks come from where they are said to, and does the table tell what became of the base LLM?"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import lmfusion.evaluation
from lmfusion import LMFusion
from lmfusion.evaluation.scoring import text_loss
from lmfusion.evaluation.suites.language import LanguageConfig, base_model, check_language, run_language
from lmfusion.utils.config_values import from_values
from tests.lmfusion import vlms

pytest.importorskip("lm_eval")
EVERYDAY = Path(lmfusion.evaluation.__file__).parent / "tasks" / "everyday.jsonl"
QUESTIONS = [
    {"question": "What is wet?", "choices": ["water", "sand", "fire"], "answer": 0},
    {"question": "What is hot?", "choices": ["ice", "fire", "snow"], "answer": 1},
]


@pytest.fixture
def task(tmp_path, own_cache):
    """A YAML file of a task with its data beside it."""
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    values = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_packaged_questions_are_sound():
    items = [json.loads(line) for line in EVERYDAY.read_text().splitlines()]
    assert len(items) > 100
    assert max(Counter(item["question"] for item in items).values()) == 1
    assert all(len(set(item["choices"])) == 4 for item in items)
    places = Counter(item["answer"] for item in items)
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) - min(places.values()) <= 1  # always answering the same one is right by chance


def test_an_own_task_beside_the_base_llm(tiny, task, tmp_path):
    result = run_language(tiny, LanguageConfig(tasks=[str(task)]), tmp_path)
    scores = {score.name: score for score in result.scores}
    accuracy = scores["mine acc"]
    assert accuracy.value in (0, 0.5, 1)
    assert accuracy.count == 2
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert "mine.jsonl" in accuracy.details["data"]
    assert scores["mine acc, base LLM"].value == accuracy.value
    assert scores["mine acc, adapted minus base"].value == 0
    assert scores["share of tensors with the base's sha256"].value == 1
    assert scores["share of prompts with the base's logits, bit for bit"].value == 1
    table, proof = result.tables
    assert table.rows[0][:4] == ("mine acc", f"{accuracy.value:.4f}", f"{accuracy.value:.4f}", "+0.0000")
    assert proof.rows[1][1] == "identical"


def test_a_changed_text_side_shows(tiny_folder, task, tmp_path):
    model = LMFusion.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.text.norm.weight[0] += 1
    result = run_language(model, LanguageConfig(tasks=[str(task)]), tmp_path)
    scores = {score.name: score.value for score in result.scores}
    assert scores["share of tensors with the base's sha256"] < 1
    assert scores["share of prompts with the base's logits, bit for bit"] == 0


def test_the_base_of_a_vision_language_model_is_its_llm(tmp_path):
    vlms.save_vlm(tmp_path / "vlm")
    model = vlms.build(tmp_path / "vlm")
    base = base_model(model)
    assert text_loss(base, ["What is this?"]) == text_loss(model, ["What is this?"])
    with torch.no_grad():
        model.text.norm.weight[0] += 1
    assert text_loss(base, ["What is this?"]) != text_loss(model, ["What is this?"])


def test_without_comparison_nothing_of_the_base_is_read(tiny_folder, task, tmp_path):
    model = LMFusion.from_pretrained(tiny_folder)
    model.base = None
    with pytest.raises(ValueError, match="made without a base LLM"):
        run_language(model, LanguageConfig(tasks=[str(task)]), tmp_path)
    result = run_language(model, LanguageConfig([str(task)], limit=1, compare_with_base=False, verify=False), tmp_path)
    assert {score.name for score in result.scores} == {"mine acc", "mine acc_norm"}
    assert result.scores[0].count == 1


def test_a_base_that_is_gone_is_said_before_any_task_is_asked(tiny_folder, task, tmp_path, monkeypatch):
    model = LMFusion.from_pretrained(tiny_folder)
    model.base = replace(model.base, name=str(tmp_path / "gone"))
    monkeypatch.setattr("lmfusion.evaluation.suites.lm_harness.ask", lambda *args: pytest.fail("a task is asked"))
    for options in ({"compare_with_base": False}, {"verify": False}):
        with pytest.raises(FileNotFoundError, match="gone"):
            run_language(model, LanguageConfig([str(task)], **options), tmp_path)


def test_data_may_lie_elsewhere(tiny, task, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(QUESTIONS[0]) + "\n")
    text = yaml.safe_load(task.read_text())
    text["dataset_kwargs"] = {}
    text["dataset_path"] = "nobody/has-this"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(text))
    config = LanguageConfig(["mine"], {"mine": str(others)}, str(tmp_path / "tasks"))
    assert run_language(tiny, config, tmp_path).scores[0].count == 1


def test_perplexities_have_no_interval_of_a_mean(tiny, task, tmp_path):
    values = yaml.safe_load(task.read_text())
    del values["doc_to_choice"]
    values |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    values["metric_list"] = [{"metric": "word_perplexity"}]
    task.write_text(yaml.safe_dump(values))
    [score] = run_language(tiny, LanguageConfig([str(task)], compare_with_base=False, verify=False), tmp_path).scores
    assert math.isfinite(score.value)
    assert score.low is None


def test_each_filter_of_a_task_has_its_own_questions(tiny, task, tmp_path):
    values = yaml.safe_load(task.read_text())
    del values["doc_to_choice"]
    values |= {"output_type": "generate_until", "doc_to_target": "{{answer}}"}
    values["generation_kwargs"] = {"until": ["."], "max_gen_toks": 2}
    values["filter_list"] = [
        {"name": "first", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
        {"name": "never", "filter": [{"function": "regex", "regex_pattern": "(0)(?!.)x"}, {"function": "take_first"}]},
    ]
    values["metric_list"] = [{"metric": "exact_match"}]
    task.write_text(yaml.safe_dump(values))
    scores = run_language(tiny, LanguageConfig([str(task)], verify=False), tmp_path).scores
    by_name = {score.name: score for score in scores}
    for name in ("mine exact_match (first)", "mine exact_match (never)"):
        assert by_name[name].count == len(QUESTIONS)
        assert by_name[name].low is not None
        assert by_name[f"{name}, adapted minus base"].low == 0


def test_what_is_missing_is_named_with_the_way_out(task, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no such file"):
        check_language(LanguageConfig([str(tmp_path / "none.yaml")]))
    with pytest.raises(ValueError, match=r"no_such_task.*does not know"):
        check_language(LanguageConfig(["no_such_task"]))
    for text, reason in (
        ("task: [", "cannot be read: .*line 2"),
        ("- a", "cannot be read: .*list"),
        ("", "cannot be read: .*NoneType"),
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"broken.yaml {reason}"):
            check_language(LanguageConfig([str(tmp_path / "broken.yaml")]))
    with pytest.raises(ValueError, match=r"include_path is .*none, and there is no such folder"):
        check_language(LanguageConfig([str(task)], include_path=str(tmp_path / "none")))
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"hellaswag \(Rowan/hellaswag\).*language.data, as {hellaswag: PATH}"):
        check_language(LanguageConfig(["hellaswag"]))
    with pytest.raises(ValueError, match="nothing there"):
        check_language(LanguageConfig(["hellaswag"], data={"hellaswag": str(tmp_path / "none")}))
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a file is one of \.json"):
        check_language(LanguageConfig(["hellaswag"], data={"hellaswag": str(tmp_path / "data.txt")}))


def unreachable(*args, **kwargs):
    raise ConnectionError("no network")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["everyday", "everyday"]}, "each once"),
        ({"limit": 0}, "language.limit must be at least 1, got 0"),
        ({"data": {"piqa": "here"}}, "'piqa', which is not in language.tasks"),
    ],
)
def test_bad_settings(values, reason):
    with pytest.raises(ValueError, match=reason):
        from_values(LanguageConfig, values)
