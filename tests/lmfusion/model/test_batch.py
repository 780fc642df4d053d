"""Documents, their labels, and their tokens in tower order."""

import pytest
import torch

from lmfusion.model.batch import (
    IGNORED,
    Document,
    SpecialTokens,
    caption_first_document,
    caption_prompt,
    draw_prompt,
    encode_caption,
    image_first_document,
    pack,
)

BOI, EOI, BOS, EOS = 50, 51, 1, 2
TOKENS = SpecialTokens(BOI, EOI, BOS, EOS)


def pack_documents(documents, frozen_text=True):
    num_images = sum(document.num_images for document in documents)
    latents = torch.arange(num_images * 4.0).reshape(num_images, 1, 2, 2)
    timesteps = torch.arange(num_images, dtype=torch.int32)
    return pack(documents, latents, torch.zeros_like(latents), timesteps, frozen_text=frozen_text)


def test_caption_first_document():
    document = caption_first_document([7, 8, 9], 4, TOKENS)
    assert document.spans == (("text", 4), ("marker", 1), ("image", 4), ("marker", 1))
    assert document.token_ids == (BOS, 7, 8, 9, BOI, EOI)
    assert document.labels == (7, 8, 9, BOI, IGNORED, EOS)
    assert document.num_tokens == 10 and document.num_images == 1


def test_image_first_document():
    document = image_first_document([7, 8, 9], 4, TOKENS)
    assert document.spans == (("text", 1), ("marker", 1), ("image", 4), ("marker", 1), ("text", 3))
    assert document.token_ids == (BOS, BOI, EOI, 7, 8, 9)
    assert document.labels == (BOI, IGNORED, 7, 8, 9, EOS)


def test_document_without_caption_does_not_learn_to_end_where_a_caption_may_follow():
    dropped, described = caption_first_document([], 4, TOKENS), image_first_document([7], 4, TOKENS)
    assert dropped.token_ids == described.token_ids[:3]
    assert dropped.labels == (BOI, IGNORED, IGNORED)


def test_prompts_are_the_documents_up_to_where_generation_starts():
    assert draw_prompt([7, 8], TOKENS).spans == caption_first_document([7, 8], 4, TOKENS).spans[:2]
    assert draw_prompt([7, 8], TOKENS).token_ids == (BOS, 7, 8, BOI)
    assert caption_prompt([], 4, TOKENS).token_ids == (BOS, BOI, EOI)
    assert caption_prompt([7], 4, TOKENS).spans == image_first_document([7], 4, TOKENS).spans


def test_tokenizers_without_bos_and_eos():
    tokens = SpecialTokens(BOI, EOI)
    assert draw_prompt([], tokens).spans == (("marker", 1),)
    assert caption_first_document([7], 4, tokens).labels == (BOI, IGNORED, IGNORED)
    assert image_first_document([7], 4, tokens).labels == (IGNORED, 7, IGNORED)


def test_pack_puts_rows_in_tower_order_and_scores_live_rows_only():
    batch = pack_documents([caption_first_document([7, 8], 4, TOKENS), image_first_document([9], 4, TOKENS)])
    constant, live = [BOS, 7, 8, BOS], [BOI, EOI, BOI, EOI, 9]
    assert batch.layout.num_constant == len(constant)
    assert batch.token_ids.tolist() == constant + live
    assert batch.labels.tolist() == [IGNORED, EOS, IGNORED, 9, EOS]
    assert batch.num_labels == 3 and batch.num_images == 2
    assert batch.timesteps.dtype == torch.int64 and batch.timesteps.tolist() == [0, 1]


def test_trained_text_is_scored_everywhere_but_never_on_image_rows():
    document = caption_first_document([7, 8], 4, TOKENS)
    batch = pack_documents([document], frozen_text=False)
    assert batch.layout.num_constant == 0
    assert batch.labels.tolist() == list(document.labels)
    assert batch.num_labels == 4


@pytest.mark.parametrize("documents", [[], [Document().text([5, 6])], [Document().image(4)], [Document().text([5])]])
def test_pack_takes_batches_of_one_modality_or_of_nothing(documents):
    batch = pack_documents(documents)
    assert batch.layout.num_tokens == sum(document.num_tokens for document in documents)
    assert batch.token_ids.shape == (batch.layout.num_text,)
    assert batch.labels.shape == (batch.layout.num_live,)


def test_pack_refuses_images_that_do_not_fit_the_documents():
    document = caption_first_document([7], 4, TOKENS)
    one, two = torch.zeros(1, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match="one entry for each of the documents' 1 images, got shape"):
        pack([document], two, two, torch.zeros(2))
    with pytest.raises(ValueError, match="shaped like latents"):
        pack([document], one, two, torch.zeros(1))
    with pytest.raises(ValueError, match="timesteps"):
        pack([document], one, one, torch.zeros(2))


def test_moved_batch_keeps_everything():
    batch = pack_documents([image_first_document([9], 4, TOKENS)])
    moved = batch.to("meta")
    assert moved.token_ids.device.type == moved.layout.device.type == moved.latents.device.type == "meta"
    assert moved.num_labels == batch.num_labels


def test_encode_caption_adds_nothing_and_refuses_emptiness(tokenizer):
    ids = encode_caption(tokenizer, " a cat ")
    assert tokenizer.decode(ids) == "a cat"
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
    with pytest.raises(ValueError, match="caption is empty"):
        encode_caption(tokenizer, " \n")


def test_special_tokens_of_a_tokenizer(tokenizer):
    tokens = SpecialTokens.of(tokenizer, 60)
    assert (tokens.boi_token_id, tokens.eoi_token_id) == (60, 61)
    assert (tokens.bos_token_id, tokens.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_tokenizer_that_adds_no_bos(tokenizer):
    class Silent:
        bos_token_id, eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id

        def __call__(self, texts, **settings):
            return tokenizer(texts, **{**settings, "add_special_tokens": False})

    assert SpecialTokens.of(Silent(), 60).bos == []


def test_control_tokens_in_a_caption_are_text(tokenizer):
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]
    ids = encode_caption(tokenizer, "an end </s> of it")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "an end </s> of it"
