"""Input images of a vision-language model in training: their embeddings and their places, always the same."""

import hashlib
import json
import re
from functools import partial

import pytest
import torch

from lmfusion.cli import main
from lmfusion.data import CaptionedImage, Conversation, Edit, Interleaved, Latents
from lmfusion.data.pipeline.loader import LoaderState
from lmfusion.model.batch import Document, SpecialTokens, pack
from lmfusion.model.vision import num_vision_tokens
from tests.lmfusion.data.pipeline.loaders import batch_digest, broken, packed_loader
from tests.lmfusion.vlms import build, picture, save_vlm

SHAPES = [(8, 8), (5, 23), (31, 7), (16, 16)]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    save_vlm(folder)
    return folder


@pytest.fixture(scope="module")
def model(vlm):
    return build(vlm)


def conversation(number, load=None):
    """Its user shows two images; its assistant draws one."""
    shown = load or partial(picture, *SHAPES[number % 4], seed=number)
    return Conversation(
        f"c/{number}",
        (
            {"role": "user", "content": ("x" * (number % 7 + 1), shown, partial(picture, 8, 8, seed=number))},
            {"role": "assistant", "content": ("So:", partial(picture, 4, 4, seed=number), "ok")},
        ),
    )


def edit(number):
    return Edit(f"e/{number}", partial(picture, *SHAPES[number % 4]), "red", partial(picture, 4, 4, seed=number))


def captioned(number):
    return CaptionedImage(f"i/{number}", partial(picture, 9, 9, seed=number), ("a picture",))


class Source:
    def __init__(self, samples):
        self.samples, self.blocks = samples, [len(samples)]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make(model, samples, monkeypatch, **options):
    return packed_loader(
        model.tokenizer,
        [Source(samples)],
        monkeypatch,
        **{
            "codec": model.codec,
            "tokens": SpecialTokens.of(model.tokenizer, model.boi_token_id),
            "tokens_per_image": model.tokens_per_image,
            "vision": model.vision,
            "pack_window": len(samples),
            "sequences_per_step": 1,
            **options,
        },
    )


def rows_of(model, load):
    return model.vision.encode([model.vision.prepare(load())])[0]


def digest(step):
    [batch] = step.batches
    seen = b"" if batch.vision_embeds is None else batch.vision_embeds.numpy().tobytes()
    return batch_digest(batch), hashlib.sha256(seen).hexdigest()


def test_a_conversation_shows_and_draws(model, monkeypatch):
    """The user's images are inputs where the template puts them; the assistant's are targets, its text is scored."""
    sample = conversation(1)
    [step] = make(model, [sample], monkeypatch).steps(LoaderState(), 1)
    [batch] = step.batches
    shown = [part for part in sample.messages[0]["content"] if callable(part)]
    expected = torch.cat([rows_of(model, load) for load in shown])
    assert torch.equal(batch.vision_embeds, expected)
    assert (batch.num_images, batch.num_target_images) == (1, 1)
    ids = batch.token_ids.tolist()
    seen = [i for i in ids if i < 0]
    assert seen == [-1 - k for k in range(len(expected))]
    decode = model.tokenizer.decode
    before, after = ids[: ids.index(-1)], ids[ids.index(seen[-1]) + 1 : ids.index(model.boi_token_id)]
    assert decode(before) == "<s>[user]" and after[0] == ids[len(before) + len(rows_of(model, shown[0]))]
    assert decode(after) == "\nxx</s>[assistant]So:"
    rest = ids[ids.index(model.boi_token_id) :]
    assert rest[:2] == [model.boi_token_id, model.eoi_token_id] and decode(rest[2:]) == "ok</s>"
    # Scored: where the assistant goes on with its words or an image, and no vision token
    decided = batch.token_ids[batch.boi_target_indices]
    assert (decided >= 0).all() and batch.boi_labels.tolist() == [False, False, False, True]


def test_vision_tokens_of_a_batch_are_in_their_places(model):
    """Constant tokens come before live ones: numbers keep the vision tokens of several documents apart."""
    tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
    drawn_first = drawn(tokens).text([5]).input_image(3).text([6])
    seen_first = Document().text([7]).input_image(2).text([8])
    latents = torch.zeros(1, 1, 4, 4)
    vision_embeds = torch.arange(5.0)[:, None] + torch.zeros(5, 32)
    batch = pack([drawn_first, seen_first], latents, latents, torch.tensor([3]), vision_embeds=vision_embeds)
    assert batch.token_ids.tolist() == [7, -4, -5, 8, model.boi_token_id, model.eoi_token_id, 5, -1, -2, -3, 6]
    rows = model.embed(batch.token_ids, batch.vision_embeds)
    assert torch.equal(rows[batch.token_ids < 0], vision_embeds[[3, 4, 0, 1, 2]])
    assert torch.equal(rows[[0, 3]], model.text.embed_tokens.weight[[7, 8]])
    # Alone and packed, with everything before them
    with torch.no_grad():
        both = model.run_layers(rows, model.encode_images(latents, torch.tensor([3]))[0], batch.layout)[0]
        no_image = latents[:0]
        alone = pack(
            [seen_first], no_image, no_image, torch.zeros(0, dtype=torch.int64), vision_embeds=vision_embeds[3:]
        )
        h_alone = model.run_layers(
            model.embed(alone.token_ids, alone.vision_embeds), rows.new_zeros(0, 16), alone.layout
        )[0]
    torch.testing.assert_close(both[:4], h_alone)


def drawn(tokens):
    return Document().marker(tokens.boi_token_id).image(4).marker(tokens.eoi_token_id)


def test_counts_that_do_not_agree_are_refused(model):
    tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
    document, latents = drawn(tokens).input_image(3), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="must hold the documents' 3 vision tokens, got 0"):
        pack([document], latents, latents, torch.tensor([3]))
    with pytest.raises(ValueError, match="must hold the documents' 3 vision tokens, got 2"):
        pack([document], latents, latents, torch.tensor([3]), vision_embeds=torch.zeros(2, 32))


def test_the_gradient_reaches_the_image_tower_and_no_vision_token(model, monkeypatch):
    [step] = make(model, [conversation(0), conversation(3), edit(2)], monkeypatch).steps(LoaderState(), 1)
    [batch] = step.batches
    batch.vision_embeds.requires_grad_()
    output = model.train()(batch=batch)
    assert output.num_target_images == 3 and output.num_labels > 0
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.image.parameters())
    assert model.image.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in (*model.text.parameters(), *model.vision.parameters()))
    # Nothing trainable stands before them, so none of them has any
    assert batch.vision_embeds.grad is None or not batch.vision_embeds.grad.any()
    model.zero_grad()
    model.eval()


def test_input_images_change_the_generated_image(model, monkeypatch):
    [step] = make(model, [conversation(0)], monkeypatch).steps(LoaderState(), 1)
    [batch] = step.batches
    loss = model(batch=batch).diffusion_loss_sum
    batch.vision_embeds.add_(1)
    assert model(batch=batch).diffusion_loss_sum != loss


def test_an_edit_sees_its_source(model, monkeypatch):
    sample = edit(1)
    whole = next(make(model, [sample], monkeypatch, caption_drop=0.0).steps(LoaderState(), 1)).batches[0]
    assert torch.equal(whole.vision_embeds, rows_of(model, sample.source))
    assert (whole.num_images, whole.num_target_images) == (1, 1)
    ids = [i for i in whole.token_ids.tolist() if i >= 0]
    assert model.tokenizer.decode(ids[:-2]) == "<s>red" and ids[-2:] == [model.boi_token_id, model.eoi_token_id]
    assert (whole.labels == model.tokenizer.eos_token_id).sum() == 1
    dropped = make(model, [edit(i) for i in range(60)], monkeypatch, caption_drop=0.5, seq_len=64)
    kinds = set()
    for step in dropped.steps(LoaderState(), 20):
        for ids, spans in zip_documents(step.batches[0], model):
            has_source, has_words = any(i < 0 for i in ids), "red" in model.tokenizer.decode([i for i in ids if i >= 0])
            kinds.add((has_source, has_words))
            assert spans == 1
    assert kinds == {(True, True), (True, False), (False, False)}


def zip_documents(batch, model):
    """Of each document its ids, in the order of its tokens, and the number of its images."""
    ids = torch.full((batch.layout.num_tokens,), model.boi_token_id + 9)
    ids[batch.layout.tower_to_sequence[: batch.layout.num_text].long()] = batch.token_ids
    starts = (batch.layout.position == 0).nonzero().flatten().tolist()
    for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        document = ids[first:end].tolist()
        yield [i for i in document if i != model.boi_token_id + 9], document.count(model.boi_token_id)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_on_gives_what_reading_through_gives(model, monkeypatch, num_workers):
    samples = [conversation(i) for i in range(12)] + [edit(i) for i in range(6)] + [captioned(i) for i in range(6)]
    options = {"seq_len": 200, "num_workers": num_workers}
    through = list(make(model, samples, monkeypatch, **options).steps(LoaderState(), 12))
    digests = [digest(step) for step in through]
    assert len(set(digests)) == 12
    again = make(model, samples, monkeypatch, cache_megabytes=0, seq_len=200, num_workers=0)
    for stop in (1, 5, 9):
        resumed = list(again.steps(through[stop - 1].state, 12 - stop))
        assert [digest(step) for step in resumed] == digests[stop:]


def test_captioned_and_interleaved_images_are_the_image_towers(model, monkeypatch):
    interleaved = Interleaved("t", ("a", partial(picture, 8, 8), "b"))
    [step] = make(model, [captioned(0), interleaved], monkeypatch, image_first=1.0).steps(LoaderState(), 1)
    assert step.batches[0].vision_embeds is None and step.batches[0].num_images == 2


def test_damaged_and_oversized_images(model, monkeypatch):
    samples = [conversation(0), conversation(1, partial(broken, "gone")), conversation(3)]
    steps = list(make(model, samples, monkeypatch, seq_len=40).steps(LoaderState(), 2))
    assert steps[-1].state == LoaderState(1, 0)
    assert [damage.reason for step in steps for damage in step.damaged] == ["gone"]
    assert sum(step.num_cut for step in steps) == 2
    latents = partial(Latents, torch.zeros(1, 4, 4), None)
    [step] = make(model, [conversation(0, latents)], monkeypatch).steps(LoaderState(), 1)
    assert "a latent cache holds latents of target images" in step.damaged[0].reason


@pytest.fixture
def recipe(vlm, tmp_path):
    """Writes a recipe of a run on lines of JSON beside a picture."""

    def write(*lines):
        picture(5, 23).save(tmp_path / "a.png")
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        values = {
            "output": str(tmp_path / "run"),
            "model": {
                "base": str(vlm),
                "image": {"patch_coder": {"kind": "linear"}},
                "codec": {"kind": "pixels", "channels": 1, "image_size": 4},
            },
            "data": {"sources": [{"kind": "interleaved", "path": str(tmp_path / "data.jsonl")}], "seq_len": 128},
            "train": {"batch_tokens": 128},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(values))
        return str(tmp_path / "recipe.yaml")

    return write


ASKED = {
    "messages": [
        {"role": "user", "content": [{"image": "a.png"}]},
        {"role": "assistant", "content": ["Like this:", {"image": "a.png"}]},
    ]
}


def test_a_latent_cache_refuses_input_images(recipe, tmp_path, capsys):
    drawn = {"content": ["a picture", {"image": "a.png"}]}
    assert main(["encode", recipe(drawn), str(tmp_path / "cache")]) == 0
    edit = {"source": "a.png", "instruction": "smaller", "target": "a.png"}
    for line in (ASKED, edit):
        assert main(["encode", recipe(drawn, line), str(tmp_path / "other")]) == 2
        assert "whose input images keep their own size" in capsys.readouterr().err


def test_sequences_are_counted_with_input_images(recipe, model, capsys):
    assert main(["data", "count", recipe(ASKED)]) == 0
    told = capsys.readouterr().out
    words = model.tokenizer("[user]\n</s>[assistant]Like this:</s>")["input_ids"]
    num_tokens = len(words) + num_vision_tokens(model.vision.config, 5, 23) + 2 + model.tokens_per_image
    assert re.search(rf"\b{num_tokens}\b", told), told
