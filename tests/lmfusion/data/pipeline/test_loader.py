"""The same sequences whatever the number of workers and ranks, wherever reading starts, and whatever is damaged."""

import threading
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmfusion.data import CaptionedImage, Interleaved, Latents
from lmfusion.data.pipeline.loader import LoaderState
from lmfusion.images.preprocessing import to_tensor
from lmfusion.model.batch import SpecialTokens
from lmfusion.utils.randomness import generator
from tests.lmfusion.data.pipeline.loaders import (
    Listed,
    batch_digest,
    broken,
    captioned,
    contents,
    image,
    latents,
    packed_loader,
    read,
    sample_ids,
)


@pytest.fixture
def make(tokenizer, monkeypatch):
    """A loader of the given sources (default: the digits), see `packed_loader`."""
    return lambda *sources, **kwargs: packed_loader(tokenizer, sources or None, monkeypatch, **kwargs)


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lmfusion-")]


def wait_until(is_so):
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


# Workers, ranks, resume


def test_sequences_do_not_depend_on_workers_or_cache(make):
    expected = contents(read(make(num_workers=0), 12))
    assert len({digest for step in expected for digest in step[0]}) == 48
    for num_workers, cache_megabytes in ((1, 1024), (2, 0), (5, 1)):
        loader = make(num_workers=num_workers, cache_megabytes=cache_megabytes)
        assert contents(read(loader, 12)) == expected
    assert contents(read(make(seed=4), 1)) != expected[:1]


def test_ranks_share_out_the_sequences_of_one(make):
    whole = read(make(), 8)
    for world_size in (2, 4):
        parts = [read(make(rank=rank, world_size=world_size), 8) for rank in range(world_size)]
        for number, step in enumerate(whole):
            of_ranks = [part[number] for part in parts]
            dealt = [batch_digest(of_ranks[i % world_size].batches[i // world_size]) for i in range(4)]
            assert dealt == [batch_digest(batch) for batch in step.batches]
            for other in of_ranks:
                assert len(other.batches) == 4 // world_size
                assert contents([other])[0][1:6] == contents([step])[0][1:6]


def test_any_state_resumes_on_any_number_of_workers_and_ranks(make):
    steps = read(make(), 14)
    expected = contents(steps)
    for at in (0, 1, 6, 12):
        assert contents(read(make(num_workers=at % 3), 13 - at, steps[at].state)) == expected[at + 1 :]
    half = read(make(rank=1, world_size=2), 3, steps[6].state)
    assert [[batch_digest(b) for b in step.batches] for step in half] == [step[0][1::2] for step in expected[7:10]]
    windows = {step.state.window for step in steps}
    assert len(windows) > 3 and {type(v) for step in steps for v in vars(step.state).values()} == {int}


def test_a_step_may_span_windows_and_a_window_steps(make):
    wide, narrow = make(sequences_per_step=30, pack_window=20), make(sequences_per_step=1, pack_window=20)
    (one,), many = read(wide, 1), read(narrow, 30)
    assert one.state == many[-1].state and one.epoch == many[-1].epoch
    assert [batch_digest(batch) for batch in one.batches] == [batch_digest(step.batches[0]) for step in many]
    assert one.num_samples == sum(step.num_samples for step in many)
    assert one.num_tokens_used == sum(step.num_tokens_used for step in many)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_resuming_equals_continuing_with_damage_and_mixed_sources(make, data):
    num = data.draw(st.integers(3, 40))
    samples = [captioned(i) for i in range(num)]
    for i in data.draw(st.sets(st.integers(0, num - 1), max_size=num)):
        samples[i] = data.draw(st.sampled_from(["unreadable", captioned(i, broken), captioned(i, caption=" ")]))
    pages = [Interleaved(f"p/{i}", ("some text", image, "x" * (7 * i), image)) for i in range(5)]
    fields = {"pack_window": data.draw(st.integers(1, 50)), "seq_len": data.draw(st.integers(70, 300))}
    sources = [Listed(samples), Listed(pages)]
    steps = read(make(*sources, weights=[3.0, 1.0], num_workers=0, **fields), 6)
    at = data.draw(st.integers(0, 4))
    resumed = make(*sources, weights=[3.0, 1.0], num_workers=data.draw(st.integers(0, 3)), **fields)
    assert contents(read(resumed, 5 - at, steps[at].state)) == contents(steps[at + 1 :])


def test_state_that_the_data_does_not_have_is_refused(make):
    with pytest.raises(ValueError, match=r"the next sequence must be one of the \d+ of window 2, got 99; the data"):
        read(make(), 1, LoaderState(2, 99))


@pytest.mark.parametrize("world_size", [3, 8])
def test_sequences_that_ranks_cannot_share_are_refused(make, world_size):
    with pytest.raises(ValueError, match=f"must be a multiple of the number of ranks, {world_size}, got 4"):
        make(world_size=world_size)


# Epochs and mixtures


def test_an_epoch_holds_every_sample_once_and_noise_is_new_in_the_next(make):
    source = Listed([captioned(i) for i in range(150)])
    steps = read(make(source, pack_window=50, sequences_per_step=1), 200)
    seen = sample_ids(steps)
    epochs = [seen[i : i + 150] for i in (0, 150)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted({f"s/{i}" for i in range(150)})
    assert epochs[0] != epochs[1]
    first = {}
    for batch in (step.batches[0] for step in steps[:60]):
        for name, clean, noise in zip(batch.sample_ids, batch.latents, batch.noise, strict=True):
            if name in first:
                assert torch.equal(clean, first[name][0]) and not torch.equal(noise, first[name][1])
            first.setdefault(name, (clean, noise))
    ends = [step.epoch for step in steps if step.state.sequence == 0]
    assert ends[:6] == [1 / 3, 2 / 3, 1.0, 4 / 3, 5 / 3, 2.0]
    noise = torch.cat([step.batches[0].noise for step in steps])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_noise_is_that_of_seed_epoch_and_sample(make):
    (step,) = read(make(Listed([captioned(i) for i in range(50)]), pack_window=50, seed=9), 1)
    batch = step.batches[0]
    for name, noise in zip(batch.sample_ids, batch.noise, strict=True):
        expected = generator(9, 0, name, "noise").standard_normal((1, 1, 8, 8), np.float32)
        assert torch.equal(noise, torch.from_numpy(expected[0]))


def test_sources_are_mixed_by_weight_whatever_their_size(make):
    sources = [Listed([captioned(f"{k}/{i}", image, "x") for i in range(n)]) for k, n in enumerate((7, 400))]
    loader = make(*sources, weights=[3, 1], pack_window=500, sequences_per_step=1)
    assert loader.num_samples == 407
    seen = sample_ids(step for step in read(loader, 120) if step.state.window < 2)
    shares = Counter(name.split("/")[1] for name in sample_ids(_of_windows(loader, 2)))
    assert shares == {"0": 750, "1": 250} and len(seen) > 500


def _of_windows(loader, num_windows):
    for step in loader.steps(LoaderState(), 10**6):
        yield step
        if step.state == LoaderState(num_windows, 0):
            return


def test_two_level_order_reads_few_blocks_at_a_time(make):
    """What a slow storage sees: the samples of a window come from two blocks of ten."""
    touched = []

    class Blocks(Listed):
        def __getitem__(self, index):
            touched.append(index // 40)
            return super().__getitem__(index)

    source = Blocks([captioned(i) for i in range(400)], blocks=[40] * 10)
    steps = _of_windows(make(source, pack_window=80, shuffle_blocks=2, num_workers=0, sequences_per_step=1), 5)
    assert sorted(sample_ids(steps)) == sorted(f"s/{i}" for i in range(400))
    assert [len(set(touched[i : i + 80])) for i in range(0, 400, 80)] == [2] * 5
    assert len(set(touched)) == 10 and len(touched) == 400


# Damaged samples


def test_a_damaged_image_leaves_a_hole_and_moves_nothing(make):
    samples = [captioned(i) for i in range(120)]
    bad = {3, 50, 51, 97}
    holes = [captioned(i, partial(broken, f"byte {i}")) if i in bad else one for i, one in enumerate(samples)]
    whole, damaged = (read(make(Listed(source)), 4) for source in (samples, holes))
    reported = []
    for one, other in zip(whole, damaged, strict=True):
        assert contents([one])[0][1:6] == contents([other])[0][1:6]
        reported += other.damaged
        for row, holed in zip(one.batches, other.batches, strict=True):
            kept = [i for i, name in enumerate(row.sample_ids) if int(name[2:]) not in bad]
            assert holed.sample_ids == tuple(row.sample_ids[i] for i in kept)
            for name in ("latents", "noise", "timesteps"):
                assert torch.equal(getattr(row, name)[kept], getattr(holed, name)), name
    assert dict(reported) == {f"s/{i}": f"byte {i}" for i in bad if f"s/{i}" in sample_ids(whole)}
    assert len(reported) >= 3


def test_a_sequence_of_damaged_samples_is_an_empty_batch(make):
    source = Listed([captioned(i, broken) for i in range(20)])
    (step,) = read(make(source, sequences_per_step=2), 1)
    assert [batch.num_images for batch in step.batches] == [0, 0] and [b.num_labels for b in step.batches] == [0, 0]
    assert step.batches[0].latents.shape == (0, 1, 8, 8) and step.batches[0].token_ids.dtype == torch.int64
    assert len(step.damaged) == step.num_samples > 0
    unreadable = make(Listed(["gone"] * 20), sequences_per_step=3, pack_window=10)
    steps = read(unreadable, 2)
    assert [(s.num_samples, len(s.damaged), s.state.window) for s in steps] == [(30, 30, 3), (30, 30, 6)]
    assert all(batch.layout.num_tokens == 0 for s in steps for batch in s.batches)


def test_one_damaged_image_costs_its_interleaved_document(make):
    pages = [Interleaved(f"p/{i}", ("text", image, partial(broken, "torn") if i == 2 else image)) for i in range(6)]
    steps = list(_of_windows(make(Listed(pages), pack_window=6, sequences_per_step=1), 1))
    assert sorted(sample_ids(steps)) == [f"p/{i}" for i in (0, 1, 3, 4, 5)]
    assert [damage for step in steps for damage in step.damaged] == [("p/2", "torn")]
    assert sum(batch.num_images for step in steps for batch in step.batches) == 10


def test_damage_is_counted_once_over_all_ranks(make):
    samples = [captioned(i, broken if i % 9 == 0 else None) for i in range(100)]
    samples[5] = "unreadable"
    source = Listed(samples)
    whole = [damage for step in read(make(source), 12) for damage in step.damaged]
    parts = [[d for step in read(make(source, rank=r, world_size=4), 12) for d in step.damaged] for r in range(4)]
    assert Counter(whole) == Counter(damage for part in parts for damage in part)
    assert any(damage.sample_id == "folder 0, sample 5" for damage in whole) and sum(map(bool, parts)) > 1


# Images and latents


def test_images_are_read_by_the_rank_that_trains_on_them_and_kept(make):
    loaded = Counter()

    def load(number):
        loaded[number] += 1
        return image(number)

    source = Listed([captioned(i, partial(load, i)) for i in range(60)])
    mine = sample_ids(read(make(source, rank=1, world_size=2, num_workers=0), 2))
    assert {f"s/{i}" for i in loaded} == set(mine)
    loaded.clear()
    read(make(source, num_workers=3), 12)
    assert loaded.total() < 100 and len(loaded) == 60  # workers may meet at one image
    loaded.clear()
    read(make(source, num_workers=0, cache_megabytes=0), 12)
    assert loaded.total() > 100


def test_latents_of_a_cache_are_taken_as_they_are(make):
    pictures = [captioned(i) for i in range(50)]
    mean = [to_tensor(one.load_image(), 8, 1) for one in pictures]
    cached = [
        one._replace(load_image=partial(latents(0)._replace, mean=m)) for one, m in zip(pictures, mean, strict=True)
    ]
    assert contents(read(make(Listed(cached)), 4)) == contents(read(make(Listed(pictures)), 4))


def test_latents_are_sampled_from_their_distribution_by_counter(make):
    source = Listed([captioned(i, partial(latents, float(i % 3), std=0.5)) for i in range(40)])
    loaders = [make(source, sample_latents=True, num_workers=n, pack_window=40, sequences_per_step=1) for n in (0, 2)]
    steps, again = (read(loader, 12) for loader in loaders)
    assert contents(steps) == contents(again)
    plain = read(make(source, pack_window=40, sequences_per_step=1), 12)
    deviations = torch.cat([s.batches[0].latents - p.batches[0].latents for s, p in zip(steps, plain, strict=True)])
    assert abs(deviations.mean()) < 0.02 and abs(deviations.std() - 0.5) < 0.02
    assert abs(np.corrcoef(deviations.flatten(), torch.cat([s.batches[0].noise for s in steps]).flatten())[0, 1]) < 0.05
    by_name = {}
    for step in steps:
        for name, drawn in zip(step.batches[0].sample_ids, step.batches[0].latents, strict=True):
            by_name.setdefault(name, []).append(drawn)
    repeated = [drawn for drawn in by_name.values() if len(drawn) > 1]
    assert repeated and all(not torch.equal(drawn[0], drawn[1]) for drawn in repeated)  # new in each epoch


@pytest.mark.parametrize(
    ("load", "fields", "message"),
    [
        (latents, {"sample_latents": True}, r"sample s/\d+: data\.sample_latents is true, but there is no variance"),
        (image, {"sample_latents": True}, r"sample s/\d+: data\.sample_latents is true"),
        (
            lambda: Latents(torch.zeros(4, 2, 2), None),
            {},
            r"sample s/\d+: the latents must have the codec's shape .*, got \[4, 2, 2\]",
        ),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_that_do_not_fit_stop_the_run(make, load, fields, message, num_workers):
    loader = make(Listed([captioned(i, load) for i in range(30)]), num_workers=num_workers, **fields)
    with pytest.raises(ValueError, match=message):
        read(loader, 1)
    assert not threads()


def test_a_source_made_for_another_model_is_refused(make, tokenizer):
    class Encoded(Listed):
        def check_made_with(self, codec, of_tokenizer):
            assert of_tokenizer is tokenizer
            raise ValueError(f"made for another {codec.config.kind} codec")

        def check_template_variables(self, template_variables):
            pass

    with pytest.raises(ValueError, match="made for another pixels codec"):
        make(Encoded([captioned(0)]))


# Threads


def test_the_tokenizer_is_left_to_its_owner(make, tokenizer):
    """Each call sets options of a tokenizer before it uses it, so that two threads must not share one."""

    class Recording:
        def __init__(self):
            self.texts = []

        def __call__(self, texts, **options):
            self.texts += texts
            return tokenizer(texts, **options)

    given = Recording()
    steps = read(packed_loader(given, tokens=SpecialTokens.of(tokenizer, len(tokenizer))), 2)
    assert contents(steps) == contents(read(make(), 2)) and given.texts == []


def test_threads_end_with_the_steps_when_they_are_closed_and_when_they_fail(make):
    assert len(read(make(num_workers=3), 5)) == 5 and not threads()
    steps = make(num_workers=3).steps(LoaderState(), 100)
    next(steps)
    assert len(threads()) > 2
    steps.close()
    assert not threads()

    def consume():
        for _ in make(num_workers=2).steps(LoaderState(), 100):
            raise KeyError("the consumer fails")

    with pytest.raises(KeyError, match="the consumer fails"):
        consume()
    assert not threads()


def test_closing_while_a_window_is_read_does_not_wait_for_all_of_it(make):
    class Slow(Listed):
        def __getitem__(self, index):
            if len(self.read) > 128:
                time.sleep(0.02)
            self.read.append(index)
            return super().__getitem__(index)

    source = Slow([captioned(i) for i in range(2000)])
    source.read = []
    steps = make(source, pack_window=128, num_workers=1).steps(LoaderState(), 100)
    next(steps)
    steps.close()
    assert len(source.read) < 200 and not threads()


def test_little_is_prepared_ahead(make):
    """Memory is bounded: a step more, or two sequences a worker."""
    loaded = []

    def load(number):
        loaded.append(number)
        return image()

    source = Listed([CaptionedImage(str(i), partial(load, i), ("x",)) for i in range(3000)])
    for num_workers, sequences_per_step, most in ((1, 4, 4), (1, 1, 2), (4, 2, 8)):
        loaded.clear()
        steps = make(source, num_workers=num_workers, sequences_per_step=sequences_per_step).steps(LoaderState(), 50)
        used = next(steps).num_samples
        wait_until(lambda: len(loaded) > used)  # noqa: B023 (called at once)
        time.sleep(0.3)
        per_row = used / sequences_per_step
        assert used < len(loaded) <= used + 1.5 * most * per_row
        steps.close()


@pytest.mark.parametrize(("sequences_per_step", "num_windows"), [(1, 2), (40, 14)])
def test_the_next_windows_are_read_while_one_is_used(make, sequences_per_step, num_windows):
    """A window has 9 sequences. Two steps, one of them ahead, are 80: of 9 windows. Another step takes 5 more."""
    read_indices = []

    class Watched(Listed):
        def __getitem__(self, index):
            read_indices.append(index)
            return super().__getitem__(index)

    source = Watched([captioned(i, caption="x") for i in range(3000)])
    steps = make(source, pack_window=100, sequences_per_step=sequences_per_step, num_workers=1).steps(LoaderState(), 50)
    next(steps)
    wait_until(lambda: len(read_indices) >= 100 * num_windows)
    time.sleep(0.1)
    assert len(read_indices) == 100 * num_windows
    steps.close()
