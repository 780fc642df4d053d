"""Edits: the documents they become, with what is dropped, their lines of JSON, sequences and latent caches."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lmfusion.cli import main
from lmfusion.data import Edit, SourceConfig, load_source
from lmfusion.data.pipeline.documents import SkippedSample, edit_document
from lmfusion.data.pipeline.mixture import SampleRef
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.batch import IGNORED
from lmfusion.model.codec import CodecConfig
from lmfusion.model.diffusion import DiffusionConfig
from tests.lmfusion.data.latent_cache.caches import SIZE, assert_same_steps, encode, encoded, loader, read
from tests.lmfusion.data.pipeline.test_documents import BOI, BOS, EOI, EOS, TOKENS, ids, no_image, plan, planner

PIXELS = CodecConfig(image_size=SIZE)


def edit(words="make it red", sample_id="a"):
    return Edit(sample_id, no_image, words, no_image)


def test_the_document_of_an_edit():
    made = plan(edit(), caption_drop=0.0, diffusion=DiffusionConfig(image_first_max_timestep=3))
    document, words = made.document, ids("make it red")
    assert document.token_ids == (BOS, *words, BOI, EOI, BOI, EOI)
    marker, image = ("marker", 1), ("image", 16)
    assert document.spans == (("text", 1), ("text", len(words)), marker, image, marker, marker, image, marker)
    assert document.is_input == (True, False)
    nothing = (IGNORED,) * (1 + len(words) + 1)
    assert document.labels == (*nothing, BOI, IGNORED, EOS)  # when to draw, and that nothing follows
    assert made.images == (no_image, no_image) and made.timesteps[0] == 0 and made.timesteps[1] > 3
    assert not made.is_cut


def test_documents_that_have_lost_something_learn_the_target_alone():
    for words, has_source, expected in (
        ([], True, (BOS, BOI, EOI, BOI, EOI)),
        ([], False, (BOS, BOI, EOI)),
    ):
        document = edit_document(words, 16, TOKENS, has_source=has_source)
        assert document.token_ids == expected and set(document.labels) == {IGNORED}
        assert document.is_input == ((True,) * has_source + (False,))


def test_shares_of_what_is_dropped():
    edits = [(SampleRef(0, 0, i), edit(sample_id=str(i))) for i in range(3000)]
    made = planner(caption_drop=0.2).plan(edits)
    lengths = Counter(len(one.document.token_ids) for one in made)
    shares = {length: count / 3000 for length, count in lengths.items()}
    whole = 5 + len(ids("make it red"))
    assert set(shares) == {whole, 5, 3}
    assert abs(shares[5] - 0.2) < 0.02 and abs(shares[3] - 0.1) < 0.02
    for one in made:
        assert len(one.images) == len(one.timesteps) == one.document.num_images
        assert one.first_image == (len(one.document.token_ids) == 3)
    levels = [one.timesteps[-1] for one in made]
    assert max(levels) > 980 and min(levels) < 20
    assert [one.timesteps[-1] for one in planner(caption_drop=0.0).plan(edits)] == levels


def test_instructions_are_cut_to_their_limit_and_to_the_row():
    limited = plan(edit("abcdef"), caption_drop=0.0, max_caption_tokens=3)
    assert limited.document.token_ids[1:-4] == tuple(ids("abc")) and not limited.is_cut
    cut = plan(edit("abcdef"), caption_drop=0.0, seq_len=41)
    assert cut.document.token_ids[1:-4] == tuple(ids("abcd")) and cut.is_cut and cut.document.num_tokens == 41
    small = plan(edit("abcdef"), caption_drop=0.0, seq_len=37)
    assert isinstance(small, SkippedSample) and "at least 38 to hold source" in small.reason
    empty = plan(edit(" "))
    assert isinstance(empty, SkippedSample) and "the instruction is empty" in empty.reason


# Lines of JSON


@pytest.fixture
def triples(tmp_path):
    """Six edits of pictures of one brightness each: source i, target 100 + i."""
    lines = []
    for i in range(6):
        for name, level in ((f"{i}.png", i), (f"{i}-new.png", 100 + i)):
            Image.fromarray(np.full((SIZE, SIZE, 3), level, np.uint8)).save(tmp_path / name)
        lines.append({"source": f"{i}.png", "instruction": f"make it {i}", "target": f"{i}-new.png", "id": f"e{i}"})
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return SourceConfig("interleaved", str(tmp_path / "edits.jsonl"))


def write(folder, line):
    (folder / "one.jsonl").write_text(json.dumps(line))
    return load_source(SourceConfig("interleaved", str(folder / "one.jsonl")), SIZE)


def test_lines_with_edits(triples, tmp_path):
    sample = load_source(triples, SIZE)[3]
    assert isinstance(sample, Edit)
    assert (sample.sample_id, sample.instruction) == ("edits.jsonl/e3", "make it 3")
    assert [image().getpixel((0, 0))[0] for image in (sample.source, sample.target)] == [3, 103]
    document = write(tmp_path, {"content": ["x"], "source": "https://example.org/page"})[0]
    assert document.parts == ("x",)  # what else a document says of itself does not matter


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"source": "0.png", "target": "1.png"}, "instruction must be a text that is not empty, got None"),
        (
            {"source": "0.png", "instruction": " ", "target": "1.png"},
            "instruction must be a text that is not empty, got ' '",
        ),
        ({"source": 3, "instruction": "x", "target": "1.png"}, "source must be a text that is not empty, got 3"),
        (
            {"source": "0.png", "instruction": "x"},
            'target must be a text that is not empty, got None; an edit is like {"source": "a.png"',
        ),
        ({"source": "../0.png", "instruction": "x", "target": "1.png"}, "must stay in the folder"),
        ({"source": "0.png", "messages": None}, "instruction must be a text that is not empty, got None"),
    ],
)
def test_lines_with_half_an_edit(tmp_path, line, message):
    with pytest.raises(ValueError, match=r"one.jsonl/line 1") as error:
        write(tmp_path, line)[0]
    assert message in str(error.value)


def test_commands_that_look_into_data(triples, tmp_path, capsys):
    assert main(["data", "check", f"interleaved={triples.path}"]) == 0
    assert "12" in capsys.readouterr().out  # images
    assert main(["data", "show", "shape_edits", "--samples", "3", "--output", str(tmp_path / "sheet.png")]) == 0
    (tmp_path / "4-new.png").write_bytes(b"nothing")
    assert main(["data", "check", f"interleaved={triples.path}"]) == 1
    assert "4-new.png" in capsys.readouterr().out


# Rows and latent caches


def test_sequences_hold_the_right_images_whatever_was_dropped_before(triples, tokenizer):
    """The same sample comes with and without its source: what is kept of one is not taken for the other."""
    pixels = {level: to_tensor(Image.new("RGB", (SIZE, SIZE), (level,) * 3), SIZE, 3) for level in range(106)}
    num_images = Counter()
    for step in read(loader([triples], PIXELS, tokenizer, caption_drop=0.4), 40):
        for row in step.batches:
            place = 0
            given = torch.ones(row.num_images, dtype=torch.bool).index_fill(0, row.target_image_indices, False).tolist()
            for sample_id in row.sample_ids:
                number = int(sample_id[-1])
                if given[place]:
                    assert torch.equal(row.latents[place], pixels[number]) and row.timesteps[place] == 0
                    place += 1
                assert not given[place] and torch.equal(row.latents[place], pixels[100 + number])
                place += 1
            assert place == row.num_images
            num_images[row.num_images > row.num_target_images] += 1
    assert num_images[True] > 10


def test_sequences_from_a_latent_cache_are_those_of_the_images(triples, tmp_path, tokenizer):
    manifest = encode(triples, tmp_path / "cache", PIXELS, tokenizer, shard_samples=4)
    assert (manifest["num_images"], manifest["num_damaged"]) == (12, 0)
    sample = load_source(encoded(tmp_path / "cache"), SIZE)[0]
    assert isinstance(sample, Edit) and sample.instruction.tolist() == ids("make it 0")
    direct = read(loader([triples], PIXELS, tokenizer), 20)
    cached = read(loader([encoded(tmp_path / "cache")], PIXELS, tokenizer), 20)
    assert_same_steps(direct, cached)
    for one, other in zip(direct, cached, strict=True):
        assert all(
            torch.equal(a.target_image_indices, b.target_image_indices)
            for a, b in zip(one.batches, other.batches, strict=True)
        )


def test_a_mixture_with_captions_and_a_damaged_target(triples, tmp_path, tokenizer):
    (tmp_path / "2-new.png").write_bytes(b"nothing")
    captions = SourceConfig("shapes", weight=2.0)
    config = replace(PIXELS, image_size=16)
    steps = read(loader([triples, captions], config, tokenizer, max_damaged=1.0), 30)
    reasons = {damage.sample_id: damage.reason for step in steps for damage in step.damaged}
    assert set(reasons) == {"edits.jsonl/e2"} and "2-new.png" in reasons["edits.jsonl/e2"]
