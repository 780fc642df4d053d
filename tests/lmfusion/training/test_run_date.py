"""A chat template that asks for the date: a run, and a latent cache, keep that of their first start."""

import datetime
import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from lmfusion import LMFusion
from lmfusion.data import SourceConfig
from lmfusion.data.latent_cache.reader import LatentShards
from lmfusion.model.codec import CodecConfig
from lmfusion.training.distributed import World
from lmfusion.training.run_date import with_date
from lmfusion.training.trainer import Trainer
from tests.lmfusion.data.latent_cache.caches import encode, encoded, loader
from tests.lmfusion.text.templates import DATED, THINKING
from tests.lmfusion.training.runs import assert_same_run


class Clock(datetime.datetime):
    """`datetime.datetime` with a day that tests set."""

    day = datetime.date(2024, 7, 26)

    @classmethod
    def now(cls, tz=None):
        return cls.combine(cls.day, datetime.time(12))


class Calendar(datetime.date):
    @classmethod
    def today(cls):
        return cls.fromordinal(Clock.day.toordinal())


@pytest.fixture
def set_day(monkeypatch):
    monkeypatch.setattr(datetime, "datetime", Clock)
    monkeypatch.setattr(datetime, "date", Calendar)

    def set_to(year, month, day):
        monkeypatch.setattr(Clock, "day", datetime.date(year, month, day))

    return set_to


@pytest.fixture
def talking(config, tiny_llama, tmp_path):
    """A run on the digits' conversations, with a template that contains the date."""
    folder = tmp_path / "llama"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(DATED)

    def make(output="run", **overrides):
        settings = {"model__base": str(folder), "data__seq_len": 512, "train__batch_tokens": 512}
        settings |= {"data__sources": [{"kind": "digit_conversations"}], "train__num_steps": 4, "checkpoint__every": 2}
        return config(output, **settings | overrides)

    return make


def words(run):
    trainer = Trainer(run)
    [step] = trainer.loader.steps(trainer.progress.loader, 1)
    return trainer.model.tokenizer.decode(step.batches[0].token_ids.clamp(max=258))


def test_a_run_resumed_on_another_day_equals_an_unbroken_one(talking, set_day):
    set_day(2024, 7, 26)
    whole, broken = talking("whole"), talking("broken")
    assert Trainer(whole).run()
    Trainer(broken).run(max_steps=1)
    set_day(2025, 1, 2)
    assert Trainer(broken).run()
    assert_same_run(whole, broken, step=4)
    assert yaml.safe_load((Path(broken.output) / "config.yaml").read_text())["data"]["today"] == "2024-07-26"
    assert "Today is 26 Jul 2024." in words(broken) and "Today is 02 Jan 2025." in words(talking("new"))
    assert "Today is 24 Dec 2030." in words(talking("given", data__today="2030-12-24"))
    with pytest.raises(ValueError, match=r"data\.today was '2024-07-26', is '2030-12-24'"):
        Trainer(talking("broken", data__today="2030-12-24"))


def test_all_ranks_have_the_date_of_the_first(talking, set_day, monkeypatch):
    set_day(2024, 7, 26)
    told = []
    monkeypatch.setattr(World, "sum_integers", lambda self, numbers: told.append(numbers) or [738728])
    other = with_date(talking(), World(1, 2, "cpu"))
    assert told == [[0]] and other.data.today == datetime.date.fromordinal(738728).isoformat()


@pytest.mark.parametrize("today", ["26 Jul 2024", "2024-13-01", "tomorrow"])
def test_an_invalid_date_is_refused(config, today):
    with pytest.raises(ValueError, match=r"data\.today must be a date as YYYY-MM-DD"):
        config(data__today=today)


def test_a_latent_cache_keeps_its_date_and_variables(tmp_path, tokenizer, set_day, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", DATED)
    talk = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Bye."}]}
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({**talk, "id": i}) + "\n" for i in range(9)))
    source = SourceConfig("interleaved", path=str(tmp_path / "talks.jsonl"))
    codec = CodecConfig(kind="pixels", channels=1, image_size=4)
    set_day(2024, 7, 26)
    manifest = encode(source, tmp_path / "cache", codec, tokenizer)
    set_day(2025, 1, 2)
    assert encode(source, tmp_path / "cache", codec, tokenizer) == manifest
    utterances = LatentShards(tmp_path / "cache")[0].utterances
    assert tokenizer.decode(utterances[0].what).startswith("Today is 26 Jul 2024.")
    loader([encoded(tmp_path / "cache")], codec, tokenizer)  # whatever the day
    monkeypatch.setattr("tests.lmfusion.data.latent_cache.caches.PackedLoader", with_variables(enable_thinking=False))
    with pytest.raises(
        ValueError, match=r"must be {}, with which the latent cache .* was made, got {'enable_thinking'"
    ):
        loader([encoded(tmp_path / "cache")], codec, tokenizer)


def with_variables(**variables):
    from lmfusion.data.pipeline.loader import PackedLoader

    return lambda *args, **kwargs: PackedLoader(*args, **kwargs, template_variables=variables)


def test_template_variables_of_a_recipe_are_trained_with_and_saved(talking, tmp_path):
    run = talking(model__template_variables={"enable_thinking": False}, train__num_steps=1, train__warmup_steps=1)
    (tmp_path / "llama" / "chat_template.jinja").write_text(THINKING)
    assert "<think>\n\n</think>\n\nHere is" in words(run)
    assert Trainer(run).run()
    folder = Path(run.output) / "model"
    model = LMFusion.from_pretrained(folder)
    assert model.config.template_variables == {"enable_thinking": False}
    assert AutoTokenizer.from_pretrained(folder).chat_template == THINKING
    with pytest.raises(ValueError, match=r"model\.template_variables was {'enable_thinking': False}, is None"):
        Trainer(talking(train__num_steps=1, train__warmup_steps=1))
    with pytest.raises(ValueError, match=r"model\.template_variables must not have the key 'messages'"):
        talking(model__template_variables={"messages": []})
