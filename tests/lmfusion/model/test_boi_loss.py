"""The loss of beginning an image after constant tokens: its value, and which weights get a gradient."""

import pytest
import torch
import torch.nn.functional as F

import lmfusion.model.losses
from lmfusion.model.assembly import text_tensors
from lmfusion.model.batch import IGNORED, Document, caption_first_document, image_first_document, pack
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import tensor_digests
from tests.lmfusion.model.test_modeling import CODEC, FAMILIES, FULL_WIDTH, IMAGE, TOKENS, TOKENS_PER_IMAGE, save_llm

BOI = TOKENS.boi_token_id
DOCUMENTS = [
    caption_first_document([5, 6, 7], TOKENS_PER_IMAGE, TOKENS),
    image_first_document([8, 9], TOKENS_PER_IMAGE, TOKENS),
    Document().text([1, 4, 11, 12]).end(TOKENS.eos_token_id),
    Document().text([13, 14], is_scored=False).text([15, 16]).marker(BOI).image(TOKENS_PER_IMAGE),
]


def make_batch(documents=DOCUMENTS, frozen_text=True):
    num_images = sum(document.num_images for document in documents)
    latents, noise = torch.randn(2, num_images, 1, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    return pack(documents, latents, noise, torch.full((num_images,), 300), frozen_text=frozen_text)


@pytest.fixture
def model(tmp_path):
    save_llm(tmp_path, FAMILIES["llama"])
    return LMFusion.from_llm(tmp_path, image=IMAGE, codec=CODEC, dtype=torch.float64)


def constant_logits(model, batch):
    """Logits of all V + 2 tokens at the constant tokens, with a gradient for every weight that has one."""
    noisy = model.diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
    x_image, _ = model.encode_images(noisy, batch.timesteps)
    h_text, _ = model.run_layers(model.embed(batch.token_ids), x_image, batch.layout)
    return model.text_logits(h_text[: batch.layout.num_constant])


def test_tokens_before_the_first_image_decide_whether_it_begins():
    batch = make_batch()
    ids = batch.token_ids[: batch.layout.num_constant].tolist()
    assert ids == [*[1, 5, 6, 7], 1, *[1, 4, 11, 12], *[13, 14, 15, 16]]
    decided = dict(zip(batch.boi_target_indices.tolist(), batch.boi_labels.tolist(), strict=True))
    begins = {3, 4, 12}  # a caption, the bos of an image-first document, and what was said before the last image
    # Token 9 has no label: the first token of a prompt is not scored
    assert decided == {token: token in begins for token in range(13) if token != 9}
    assert batch.num_boi_targets == 12 and batch.num_labels == 1 + 3
    moved = batch.to("meta")
    assert (
        moved.num_boi_targets == 12 and moved.boi_labels.device.type == moved.boi_target_indices.device.type == "meta"
    )


def test_a_trained_text_tower_decides_by_its_labels():
    batch = make_batch(frozen_text=False)
    assert batch.num_boi_targets == 0 and batch.num_labels == 12 + 4


def test_next_documents_marker_is_no_label_of_the_one_before():
    batch = make_batch([Document().text([4, 5]), Document().marker(BOI).image(TOKENS_PER_IMAGE)])
    assert batch.boi_target_indices.tolist() == [0] and batch.boi_labels.tolist() == [False]


@pytest.mark.parametrize("max_logits", [1, 130, 2**24])
def test_loss_and_gradient_are_those_of_a_cross_entropy_over_everything(model, monkeypatch, max_logits):
    monkeypatch.setattr(lmfusion.model.losses, "MAX_LOGITS", max_logits)
    batch = make_batch()
    output = model(batch=batch)
    assert output.num_boi_targets == 12
    output.boi_loss_sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert list(found) == ["image.marker_head"]

    model.zero_grad()
    logits = constant_logits(model, batch)
    labels = torch.full((len(logits),), IGNORED)
    labels[:4], labels[4], labels[5:9] = torch.tensor([5, 6, 7, BOI]), BOI, torch.tensor([4, 11, 12, 2])
    labels[10:13] = torch.tensor([15, 16, BOI])
    full = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    full.backward()
    torch.testing.assert_close(found["image.marker_head"], model.image.marker_head.grad, rtol=1e-12, atol=1e-12)
    # What it leaves out is what the LLM alone thinks of its text
    log_probs, words = logits[:, :BOI].log_softmax(-1), labels.clamp(min=0)
    own = -log_probs[torch.arange(13), words.clamp(max=BOI - 1)][(labels != IGNORED) & (labels != BOI)].sum()
    torch.testing.assert_close(output.boi_loss_sum, full - own)


def test_the_loss_is_the_sum_of_three_means(model):
    batch = make_batch()
    output = model(batch=batch)
    expected = output.lm_loss_sum / 4 + output.boi_loss_sum / 12 + 5 * output.diffusion_loss_sum / 3
    torch.testing.assert_close(output.loss, expected)


def test_where_images_begin_is_learned_and_the_text_side_keeps_every_bit(tmp_path):
    save_llm(tmp_path, FAMILIES["qwen3"])
    model = LMFusion.from_llm(tmp_path, image=FULL_WIDTH, codec=CODEC, dtype=torch.float64)
    documents = [DOCUMENTS[0], DOCUMENTS[2]]
    batch, ids = make_batch(documents), torch.tensor([[1, 4, 11, 12]])
    before, hashes = model(ids).logits, tensor_digests(text_tensors(model))
    optimizer = torch.optim.Adam([model.image.marker_head], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        model(batch=batch).boi_loss_sum.backward()
        optimizer.step()
    with torch.no_grad():
        chosen = constant_logits(model, batch).argmax(dim=-1) == BOI
    assert chosen.tolist() == [False] * 3 + [True] + [False] * 4
    assert torch.equal(model(ids).logits, before) and tensor_digests(text_tensors(model)) == hashes
