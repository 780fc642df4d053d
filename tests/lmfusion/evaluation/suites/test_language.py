"""Tasks read the right data, and the table compares a model with its base LLM."""

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
from lmfusion.evaluation.suites.language import LanguageConfig, LanguageSuite, base_model
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


def test_a_custom_task_is_compared_with_the_base_llm(tiny, task, tmp_path):
    result = LanguageSuite(LanguageConfig(tasks=[str(task)])).run(tiny, tmp_path)
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


def test_a_changed_text_tower_shows(tiny_folder, task, tmp_path):
    model = LMFusion.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.text.norm.weight[0] += 1
    result = LanguageSuite(LanguageConfig(tasks=[str(task)])).run(model, tmp_path)
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
    with pytest.raises(ValueError, match="must have a base LLM to compare with"):
        LanguageSuite(LanguageConfig(tasks=[str(task)])).run(model, tmp_path)
    result = LanguageSuite(LanguageConfig([str(task)], limit=1, compare_with_base=False, verify=False)).run(
        model, tmp_path
    )
    assert {score.name for score in result.scores} == {"mine acc", "mine acc_norm"}
    assert result.scores[0].count == 1


def test_a_missing_base_is_reported_before_any_task_runs(tiny_folder, task, tmp_path, monkeypatch):
    model = LMFusion.from_pretrained(tiny_folder)
    model.base = replace(model.base, name=str(tmp_path / "gone"))
    monkeypatch.setattr("lmfusion.evaluation.suites.lm_harness.run_tasks", lambda *args: pytest.fail("a task runs"))
    for options in ({"compare_with_base": False}, {"verify": False}):
        with pytest.raises(FileNotFoundError, match="gone"):
            LanguageSuite(LanguageConfig([str(task)], **options)).run(model, tmp_path)


def test_data_may_be_elsewhere(tiny, task, tmp_path):
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps(QUESTIONS[0]) + "\n")
    text = yaml.safe_load(task.read_text())
    text["dataset_kwargs"] = {}
    text["dataset_path"] = "nobody/has-this"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(yaml.safe_dump(text))
    config = LanguageConfig(["mine"], {"mine": str(others)}, str(tmp_path / "tasks"))
    assert LanguageSuite(config).run(tiny, tmp_path).scores[0].count == 1


def test_perplexities_have_no_interval_of_a_mean(tiny, task, tmp_path):
    values = yaml.safe_load(task.read_text())
    del values["doc_to_choice"]
    values |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"}
    values["metric_list"] = [{"metric": "word_perplexity"}]
    task.write_text(yaml.safe_dump(values))
    [score] = (
        LanguageSuite(LanguageConfig([str(task)], compare_with_base=False, verify=False)).run(tiny, tmp_path).scores
    )
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
    scores = LanguageSuite(LanguageConfig([str(task)], verify=False)).run(tiny, tmp_path).scores
    by_name = {score.name: score for score in scores}
    for name in ("mine exact_match (first)", "mine exact_match (never)"):
        assert by_name[name].count == len(QUESTIONS)
        assert by_name[name].low is not None
        assert by_name[f"{name}, adapted minus base"].low == 0


def test_errors_name_what_is_missing_and_the_way_out(task, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"language.tasks must name existing YAML files, got .*none.yaml"):
        LanguageSuite(LanguageConfig([str(tmp_path / "none.yaml")])).check()
    with pytest.raises(ValueError, match=r"must name tasks that lm-evaluation-harness has, got 'no_such_task'"):
        LanguageSuite(LanguageConfig(["no_such_task"])).check()
    for text, reason in (
        ("task: [", "must be readable, got .*line 2"),
        ("- a", "must be readable, got .*list"),
        ("", "must be readable, got .*NoneType"),
    ):
        (tmp_path / "broken.yaml").write_text(text)
        with pytest.raises(ValueError, match=f"broken.yaml {reason}"):
            LanguageSuite(LanguageConfig([str(tmp_path / "broken.yaml")])).check()
    with pytest.raises(ValueError, match=r"include_path must be an existing folder, got .*none"):
        LanguageSuite(LanguageConfig([str(task)], include_path=str(tmp_path / "none"))).check()
    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        ValueError,
        match=r"task hellaswag must be readable, got .* for Rowan/hellaswag.*language.data, as {hellaswag: PATH}",
    ):
        LanguageSuite(LanguageConfig(["hellaswag"])).check()
    with pytest.raises(ValueError, match=r"language.data.hellaswag must be an existing folder or file, got .*none"):
        LanguageSuite(LanguageConfig(["hellaswag"], data={"hellaswag": str(tmp_path / "none")})).check()
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must be a folder or one of \.json"):
        LanguageSuite(LanguageConfig(["hellaswag"], data={"hellaswag": str(tmp_path / "data.txt")})).check()


def unreachable(*args, **kwargs):
    raise ConnectionError("no network")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["everyday", "everyday"]}, "and each once, got"),
        ({"limit": 0}, "language.limit must be at least 1, got 0"),
        ({"data": {"piqa": "here"}}, "keys of language.data must be in language.tasks .* got 'piqa'"),
    ],
)
def test_bad_settings(values, reason):
    with pytest.raises(ValueError, match=reason):
        from_values(LanguageConfig, values)
