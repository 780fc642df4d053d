"""Windows of samples become sequences: full ones, of whole documents, the same in any order of reading."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmfusion.data import CaptionedImage, DataConfig, Interleaved, SourceConfig
from lmfusion.data.pipeline.packing import WindowReader
from lmfusion.model.batch import SpecialTokens
from lmfusion.model.diffusion import DiffusionConfig
from tests.lmfusion.conftest import build_tokenizer
from tests.lmfusion.data.pipeline.loaders import Listed, captioned, image, realistic_captions

TOKENIZER = build_tokenizer()


def reader(*sources, tokens_per_image=16, seed=0, **fields):
    configs = [SourceConfig("folder", path=f"photos {i}") for i in range(len(sources))]
    return WindowReader(
        DataConfig(configs, **fields),
        sources,
        tokenizer=TOKENIZER,
        tokens=SpecialTokens.of(TOKENIZER, len(TOKENIZER)),
        tokens_per_image=tokens_per_image,
        diffusion=DiffusionConfig(),
        seed=seed,
    )


def ids(window):
    return [plan.sample_id for sequence in window.sequences for plan in sequence.plans]


def test_caption_pairs_fill_sequences_of_4096_tokens():
    """Images of 256 tokens with captions of 5 to 60: at least 95 % of the positions hold a token."""
    captions = realistic_captions(4096)
    source = Listed([CaptionedImage(str(i), image, (caption,)) for i, caption in enumerate(captions)])
    windows = [reader(source, tokens_per_image=256).read(number) for number in range(2)]
    sequences = [sequence for window in windows for sequence in window.sequences]
    efficiency = sum(sequence.num_tokens_used for sequence in sequences) / (4096 * len(sequences))
    assert efficiency >= 0.95, f"packing efficiency {efficiency:.4f}"
    assert max(sequence.num_tokens_used for sequence in sequences) <= 4096
    assert len(set(ids(windows[0]))) == 2048


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 40), st.integers(0, 9))
def test_every_sample_of_a_window_is_in_one_row(lengths, pack_window, seed):
    source = Listed([CaptionedImage(str(i), image, ("y" * n,)) for i, n in enumerate(lengths)])
    windows = reader(source, seq_len=128, pack_window=pack_window, seed=seed)
    drawn = []
    for number in range(-(-len(lengths) // pack_window)):
        window = windows.read(number)
        assert all(0 < sequence.num_tokens_used <= 128 for sequence in window.sequences) and not window.damaged
        assert len(ids(window)) == pack_window
        drawn += ids(window)
    assert set(drawn[: len(lengths)]) <= set(drawn) == {str(i) for i in range(len(lengths))}


def test_windows_are_the_same_whoever_reads_them_and_in_any_order():
    source = Listed([captioned(i) for i in range(300)])
    expected = [reader(source, seq_len=256, pack_window=90).read(number) for number in range(4)]
    again = reader(source, seq_len=256, pack_window=90)
    with ThreadPoolExecutor(3) as pool:
        assert [again.read(number, pool.map) for number in (3, 1, 0, 2)] == [expected[i] for i in (3, 1, 0, 2)]


def test_sequences_of_a_window_are_shuffled():
    """So that steps do not differ in kind with their place in a window: the packer fills long documents together."""
    pages = [Interleaved(f"long {i}", ("z" * 200,)) for i in range(100)]
    source = Listed(pages + [captioned(i, caption="short") for i in range(900)])
    sequences = reader(source, seq_len=256, pack_window=1000).read(0).sequences
    num_documents = np.array([len(sequence.plans) for sequence in sequences])
    assert abs(np.corrcoef(num_documents, range(len(sequences)))[0, 1]) < 0.25


def test_unreadable_samples_are_named_and_have_no_place():
    samples = [captioned(i) for i in range(20)]
    samples[4], samples[11] = "member 4 is cut off", captioned(11, caption=" ")
    window = reader(Listed(samples), seq_len=256, pack_window=20).read(0)
    assert sorted(ids(window)) == sorted(f"s/{i}" for i in range(20) if i not in (4, 11))
    assert dict(window.damaged) == {
        "folder photos 0, sample 4": "member 4 is cut off",
        "s/11": "the caption is empty; write one, or leave the sample out",
    }


def test_sequences_have_equal_shares_of_damaged_samples():
    """Else a window's damage would count before its samples do, and stop a run that has no more of it than it may."""
    samples = [captioned(i) for i in range(400)]
    for i in range(0, 400, 20):
        samples[i] = "gone"
    window = reader(Listed(samples), seq_len=256, pack_window=400).read(0)
    numbers = [len(sequence.damaged) for sequence in window.sequences]
    assert len(numbers) > 10 and sum(numbers) == len(set(window.damaged)) == 20
    assert max(numbers) - min(numbers) <= 1
    assert sum(sequence.num_samples for sequence in window.sequences) == 400


def test_window_without_a_readable_sample_has_one_empty_row():
    window = reader(Listed(["gone"] * 5), pack_window=5).read(0)
    assert [sequence.plans for sequence in window.sequences] == [()] and len(window.damaged) == 5


def test_sequences_count_cut_documents():
    source = Listed([Interleaved("a", ("q" * 300,)), Interleaved("b", ("q" * 20,))])
    (sequence,) = [
        sequence for sequence in reader(source, seq_len=256, pack_window=2).read(0).sequences if sequence.num_cut
    ]
    assert sequence.num_cut == 1 and sequence.num_tokens_used == 256


def test_source_without_samples_is_refused():
    with pytest.raises(ValueError, match="the data source folder photos 1 has no samples"):
        reader(Listed([captioned(0)]), Listed([]))
