"""What samples become: kinds and their shares, cuts, texts in tokens; all known before an image is read."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfusion.data import CaptionedImage, DataConfig, Interleaved, SourceConfig
from lmfusion.data.pipeline.documents import DocumentPlanner, SkippedSample
from lmfusion.data.pipeline.mixture import SampleRef
from lmfusion.model.batch import IGNORED, SpecialTokens
from lmfusion.model.diffusion import DiffusionConfig
from tests.lmfusion.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
TOKENS = SpecialTokens.of(TOKENIZER, len(TOKENIZER))
BOS, EOS, BOI, EOI = TOKENS.bos_token_id, TOKENS.eos_token_id, TOKENS.boi_token_id, TOKENS.eoi_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def no_image():
    raise AssertionError("images are not read for a plan")


def planner(tokens_per_image=16, diffusion=None, seed=0, **fields):
    config = DataConfig([SourceConfig("digits")], **fields)
    return DocumentPlanner(
        config,
        tokenizer=TOKENIZER,
        tokens=TOKENS,
        tokens_per_image=tokens_per_image,
        diffusion=diffusion or DiffusionConfig(),
        seed=seed,
    )


def plan(sample, epoch=0, **fields):
    (made,) = planner(**fields).plan([(SampleRef(0, epoch, 0), sample)])
    return made


def captioned(*captions, sample_id="a"):
    return CaptionedImage(sample_id, no_image, captions)


CAPTION_FIRST, IMAGE_FIRST = {"image_first": 0.0, "caption_drop": 0.0}, {"image_first": 1.0}


def test_caption_first_and_image_first():
    document = plan(captioned("a cat"), **CAPTION_FIRST).document
    assert document.token_ids == (BOS, *ids("a cat"), BOI, EOI)
    assert [modality for modality, _ in document.spans] == ["text", "marker", "image", "marker"]
    document = plan(captioned("a cat"), **IMAGE_FIRST).document
    assert document.token_ids == (BOS, BOI, EOI, *ids("a cat")) and document.labels[-1] == EOS


def test_shares_of_document_kinds_and_noise_limit():
    made = planner(diffusion=DiffusionConfig(image_first_max_timestep=100)).plan(
        [(SampleRef(0, 0, i), captioned("a cat", sample_id=str(i))) for i in range(3000)]
    )
    levels = {"caption": [], "dropped": [], "image": []}
    for one in made:
        is_dropped = one.document.token_ids == (BOS, BOI, EOI)
        kind = "dropped" if is_dropped else "image" if one.document.token_ids[1] == BOI else "caption"
        levels[kind] += one.timesteps
    counts = Counter({kind: len(of_kind) for kind, of_kind in levels.items()})
    assert counts.total() == 3000
    assert abs(counts["image"] / 3000 - 0.2) < 0.025
    assert abs(counts["dropped"] / (3000 - counts["image"]) - 0.1) < 0.02
    assert max(levels["image"]) <= 100 and min(levels["image"]) < 5
    assert max(levels["caption"]) > 980 and min(levels["caption"]) < 20


def test_plans_change_with_epoch_and_seed_and_with_nothing_else():
    samples = [(SampleRef(0, 0, i), captioned("one", "two", "three", sample_id=str(i))) for i in range(40)]
    made = planner().plan(samples)
    assert made[7:9] == planner().plan(samples[7:9])
    assert made[7] == planner(num_workers=5, pack_window=7, seq_len=999).plan(samples[7:8])[0]
    chosen = Counter(one.document.token_ids for one in made)
    assert len(chosen) > 4  # captions, and kinds
    later = planner().plan([(SampleRef(0, 1, i), sample) for i, (_, sample) in enumerate(samples)])
    assert [one.timesteps for one in later] != [one.timesteps for one in made]
    assert [one.timesteps for one in planner(seed=1).plan(samples)] != [one.timesteps for one in made]


def test_changing_one_share_leaves_the_other_draws_alone():
    samples = [(SampleRef(0, 0, i), captioned("one", sample_id=str(i))) for i in range(60)]
    some, none = (planner(image_first=0.0, caption_drop=share).plan(samples) for share in (0.3, 0.0))
    assert [one.timesteps for one in some] == [one.timesteps for one in none]
    assert sum(one.document != other.document for one, other in zip(some, none, strict=True)) > 5


def test_captions_are_cut_to_their_limit_and_to_the_row():
    assert plan(captioned("abcdef"), max_caption_tokens=3, **CAPTION_FIRST).document.token_ids[1:4] == tuple(ids("abc"))
    assert not plan(captioned("abcdef"), max_caption_tokens=3, seq_len=22, **CAPTION_FIRST).is_cut
    tight = plan(captioned("abcdef"), seq_len=22, **CAPTION_FIRST)
    assert tight.is_cut and tight.document.num_tokens == 22
    assert tight.document.token_ids == (BOS, *ids("abc"), BOI, EOI)
    with pytest.raises(ValueError, match=r"data\.seq_len must be at least 20 to hold an image.*, got 19"):
        planner(seq_len=19)
    planner(seq_len=20)


def test_token_ids_stand_for_their_text():
    text = plan(captioned("a cat"))
    assert plan(captioned(np.array(ids("a cat"), np.int32))) == text
    mixed = Interleaved("b", ("one", no_image, "two"))
    encoded = Interleaved("b", (np.array(ids("one"), np.int32), no_image, np.array(ids("two"), np.int32)))
    assert plan(encoded) == plan(mixed)
    assert all(type(i) is int for i in plan(encoded).document.token_ids)


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (captioned(" \n"), "the caption is empty"),
        (captioned(), "the caption is empty"),
        (captioned(np.array([], np.int32)), "the caption is empty"),
        (captioned("cat \ud83d"), "not valid Unicode: surrogates not allowed at character 4"),
        (Interleaved("a", ("fine", no_image, "\udfff")), "not valid Unicode"),
        (Interleaved("a", (" ", "")), "neither text nor an image"),
        (Interleaved("a", ()), "neither text nor an image"),
    ],
)
def test_a_damaged_text_costs_its_sample_alone(sample, reason):
    made = planner().plan([(SampleRef(0, 0, 0), sample), (SampleRef(0, 0, 1), captioned("fine", sample_id="b"))])
    assert isinstance(made[0], SkippedSample) and made[0].sample_id == "a" and reason in made[0].reason
    assert made[1].sample_id == "b"


def test_special_tokens_in_a_text_are_text():
    document = plan(captioned("</s>"), **CAPTION_FIRST).document
    assert EOS not in document.token_ids and len(document.token_ids) == 3 + len("</s>")


# Interleaved documents


def test_interleaved_parts_keep_their_order():
    made = plan(Interleaved("a", ("one ", no_image, no_image, " two", " ", "three")), tokens_per_image=2)
    assert made.document.token_ids == (BOS, *ids("one"), BOI, EOI, BOI, EOI, *ids("two"), *ids("three"))
    assert made.document.spans[2:7] == (("marker", 1), ("image", 2), ("marker", 1), ("marker", 1), ("image", 2))
    assert made.document.labels[-1] == EOS and len(made.images) == len(made.timesteps) == 2
    assert not made.is_cut
    assert plan(Interleaved("a", ("only text",))).images == ()


def test_interleaved_documents_are_cut_after_the_last_part_that_fits():
    parts = ("abc", no_image, "defg", no_image, "h")
    whole = plan(Interleaved("a", parts), seq_len=45, tokens_per_image=16)
    assert whole.document.num_tokens == 1 + 3 + 18 + 4 + 18 + 1 == 45 and not whole.is_cut
    no_end = plan(Interleaved("a", parts), seq_len=44, tokens_per_image=16)
    assert no_end.is_cut and len(no_end.images) == 2 and no_end.document.num_tokens == 44
    assert no_end.document.labels[-1] == IGNORED  # it does not end there
    one_image = plan(Interleaved("a", parts), seq_len=43, tokens_per_image=16)
    assert one_image.is_cut and len(one_image.images) == 1 and one_image.document.num_tokens == 26
    assert one_image.timesteps == whole.timesteps[:1]
    cropped = plan(Interleaved("a", parts), seq_len=24, tokens_per_image=16)
    assert cropped.document.token_ids[-2:] == tuple(ids("de")) and cropped.document.labels[-1] == IGNORED


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.just(no_image), st.text("abc ", max_size=30)), max_size=12), st.integers(24, 120))
def test_no_interleaved_document_outgrows_its_sequence_or_splits_an_image(parts, seq_len):
    made = plan(Interleaved("a", tuple(parts)), seq_len=seq_len)
    num_tokens = 1 + sum(18 if callable(part) else len(part.strip()) for part in parts)
    if num_tokens == 1:
        assert isinstance(made, SkippedSample)
        return
    assert made.document.num_tokens <= seq_len
    assert made.is_cut == (num_tokens > seq_len)
    assert {length for modality, length in made.document.spans if modality == "image"} <= {16}
    assert made.document.num_images == len(made.images) == len(made.timesteps)
    assert len(made.document.token_ids) == len(made.document.labels) == made.document.num_tokens - 16 * len(made.images)


def test_all_images_of_some_interleaved_documents_keep_low_noise():
    pages = [(SampleRef(0, 0, i), Interleaved(str(i), (no_image,) * 6)) for i in range(1000)]
    made = planner(diffusion=DiffusionConfig(image_first_max_timestep=100)).plan(pages)
    low = [max(one.timesteps) <= 100 for one in made]
    assert abs(np.mean(low) - 0.2) < 0.04
    assert len({one.timesteps for one in made}) == 1000 and len(set(made[0].timesteps)) > 3
