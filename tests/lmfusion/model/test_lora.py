"""peft's LoRA on the image side: applied, exact, trained alone, on and off; unsupported adapters are refused."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

import lmfusion_kernels as lk
from lmfusion.model.batch import SpecialTokens, caption_first_document, encode_caption, image_first_document, pack
from lmfusion.model.modeling import LMFusion

peft = pytest.importorskip("peft")
LoraConfig, PeftModel, get_peft_model = peft.LoraConfig, peft.PeftModel, peft.get_peft_model

PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
TARGETS = rf"image\.layers\..*\.({'|'.join(PROJECTIONS)})"
UNET = {"kind": "unet", "channels": (8, 16), "num_blocks": 1}


def build(folder, dtype=torch.float64, separation="deep", patch_coder=None):
    """A model whose every weight matters: weights that start at zero are random, too."""
    model = LMFusion.from_llm(
        folder,
        image={
            "hidden_size": 16 if separation == "deep" else None,
            "separation": separation,
            "patch_coder": patch_coder or {"kind": "linear"},
        },
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
        dtype=dtype,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def add_lora(model, fill=True, name="default", **settings):
    """The model with LoRA by peft; its B matrices, which start at zero, are filled."""
    settings = {"target_modules": TARGETS, "r": 3, "lora_alpha": 6, **settings}
    adapted = get_peft_model(model, LoraConfig(**settings), adapter_name=name)
    return fill_b(adapted, name) if fill else adapted


def fill_b(adapted, name="default", seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if f"lora_B.{name}." in key:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return adapted


def make_batch(model, dtype=torch.float64, seed=0):
    tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
    ids = [encode_caption(model.tokenizer, caption) for caption in ("a seven", "the digit three")]
    documents = [
        caption_first_document(ids[0], model.tokens_per_image, tokens),
        image_first_document(ids[1], model.tokens_per_image, tokens),
    ]
    latents, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return pack(documents, latents, noise, torch.tensor([600, 0]))


def loss_of(model, dtype=torch.float64, seed=0):
    return model(batch=make_batch(model, dtype, seed)).loss


def draw(model):
    return np.asarray(model.draw(["a seven"], num_steps=2, sampler="ddim", guidance_scale=2.0)[0])


def is_lora(name):
    return "lora_" in name


# In force


@pytest.mark.parametrize("separation", ["deep", "shallow"])
def test_adapted_equals_merged(tiny_llama, separation):
    base = loss_of(build(tiny_llama, separation=separation))
    adapted = add_lora(build(tiny_llama, separation=separation), fill=False)
    assert torch.equal(loss_of(adapted), base)  # B is zero
    loss = loss_of(fill_b(adapted))
    assert abs(loss - base) > 1e-3
    num_wrapped = sum(is_lora(name) for name, _ in adapted.named_parameters())
    assert num_wrapped == 2 * 2 * (4 if separation == "deep" else 2)  # A and B, two layers
    merged = adapted.merge_and_unload()
    assert isinstance(merged, LMFusion) and not any(map(is_lora, dict(merged.named_parameters())))
    torch.testing.assert_close(loss_of(merged), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_every_projection_counts(tiny_llama, projection):
    base = loss_of(build(tiny_llama))
    adapted = add_lora(build(tiny_llama), target_modules=rf"image\.layers\.1\..*\.{projection}")
    loss = loss_of(adapted)
    assert abs(loss - base) > 1e-4
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"o_proj": 1}},
        {"layers_to_transform": 1},
        {"target_modules": None, "target_parameters": ["image.layers.0.mlp.down_proj.weight"]},
    ],
)
def test_scaling_rank_and_layers_are_those_of_peft(tiny_llama, settings):
    if "layers_to_transform" in settings:
        settings = {**settings, "target_modules": list(PROJECTIONS), "layers_pattern": "image.layers"}
    adapted = add_lora(build(tiny_llama), **settings)
    loss = loss_of(adapted)
    assert abs(loss - loss_of(build(tiny_llama))) > 1e-4
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-12, atol=0)


def test_adalora_is_a_sum_too(tiny_llama):
    config = peft.AdaLoraConfig(target_modules=TARGETS, total_step=100, tinit=10, tfinal=10)
    adapted = get_peft_model(build(tiny_llama), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_E" in name:
                parameter += 10
    loss = loss_of(adapted)
    assert abs(loss - loss_of(build(tiny_llama))) > 1e-3
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-12, atol=0)


def test_on_off_merged_and_several(tiny_llama):
    model = build(tiny_llama)
    base = loss_of(model)
    adapted = add_lora(model, name="one")
    adapted.add_adapter("two", LoraConfig(target_modules=TARGETS, r=2))
    fill_b(adapted, "two", seed=2)
    losses = {}
    for names in ("one", "two", ["one", "two"]):
        adapted.base_model.set_adapter(names)
        losses[str(names)] = loss_of(adapted).item()
    assert len({base.item(), *losses.values()}) == 4
    with adapted.disable_adapter():
        assert loss_of(adapted).item() == pytest.approx(base.item(), rel=1e-12)
    assert loss_of(adapted).item() == pytest.approx(losses["['one', 'two']"], rel=1e-12)

    adapted.merge_adapter()
    assert loss_of(adapted).item() == pytest.approx(losses["['one', 'two']"], rel=1e-12)
    with adapted.disable_adapter():  # unmerges, as peft's own layers do
        torch.testing.assert_close(loss_of(adapted), base, rtol=1e-12, atol=0)
    assert loss_of(adapted).item() == pytest.approx(losses["['one', 'two']"], rel=1e-12)
    torch.testing.assert_close(loss_of(adapted.unload()), base, rtol=1e-12, atol=0)


def test_images_with_the_adapter_on_off_and_merged(tiny_llama):
    model = build(tiny_llama)
    base, words = draw(model), model(torch.arange(9)[None]).logits
    adapted = add_lora(model)
    on = draw(adapted)
    assert (on != base).mean() > 0.5
    assert torch.equal(model(torch.arange(9)[None]).logits, words)
    with adapted.disable_adapter():
        np.testing.assert_array_equal(draw(adapted), base)
    np.testing.assert_array_equal(draw(adapted.merge_and_unload()), on)


def test_bfloat16_rows_take_the_sum_in_float32(tiny_llama):
    """W is bfloat16 and A and B are peft's float32: the sum is rounded once."""
    model = build(tiny_llama, torch.bfloat16)
    add_lora(model)
    layer = model.image.layers[1]
    linear = layer.mlp.down_proj
    update = 2 * linear.lora_B["default"].weight @ linear.lora_A["default"].weight
    assert update.dtype == torch.float32 and linear.weight.dtype == torch.bfloat16
    expected = (linear.weight.float() + update).bfloat16()
    assert torch.equal(layer.weights(torch.bfloat16).down_proj, expected)
    assert not torch.equal(expected, linear.weight + update.bfloat16())
    assert draw(model).std() > 5


def test_a_block_outside_the_model(tiny_llama):
    """RoutedBlock takes adapters as the model does, on either tower."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"block": lk.RoutedBlock(32, 48, 4, 2, qkv_bias=True)}).double()
    layout = lk.TokenLayout.from_spans([[("text", 5), ("image", 4)]], frozen_text=False)
    rope = lk.rope_tables(layout.position, torch.ones(4))
    rows = torch.randn(9, 32, dtype=torch.float64)
    base = holder["block"](rows, layout, rope)
    adapted = fill_b(get_peft_model(holder, LoraConfig(target_modules=["qkv_proj", "down_proj"])))
    found = holder["block"](rows, layout, rope)
    assert ((found - base).abs().amax(dim=1) > 1e-3).all()
    torch.testing.assert_close(adapted.merge_and_unload()["block"](rows, layout, rope), found, rtol=1e-12, atol=1e-12)


# Training


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_gradients_reach_the_adapter_alone_and_are_those_of_the_dense_weights(tiny_llama, recompute):
    """With W' = W + s B A: dB = s dW' A^T and dA = s B^T dW', dW' from the merged model."""
    adapted = add_lora(build(tiny_llama)).train()
    adapted.base_model.model.recompute = recompute
    loss_of(adapted).backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}
    assert gradients.keys() == {name for name, _ in adapted.named_parameters() if is_lora(name)}
    factors = {name: p.detach().clone() for name, p in adapted.named_parameters() if is_lora(name)}

    dense = adapted.merge_and_unload().train()
    dense.image.requires_grad_(True)
    loss_of(dense).backward()
    for name, parameter in dense.image.layers.named_parameters():
        if not name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS)):
            continue
        prefix = f"base_model.model.image.layers.{name.removesuffix('.weight')}"
        a, b = (f"{prefix}.lora_{part}.default.weight" for part in "AB")
        torch.testing.assert_close(gradients[b], 2 * parameter.grad @ factors[a].T, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[a], 2 * factors[b].T @ parameter.grad, rtol=1e-9, atol=1e-12)
        assert gradients[a].abs().max() > 1e-6 and gradients[b].abs().max() > 1e-6


def test_training_changes_the_adapter_alone(tiny_llama):
    model = build(tiny_llama, torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    words = model(torch.arange(9)[None]).logits
    adapted = add_lora(model, fill=False)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.train()
    first = loss_of(adapted, torch.float32).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(adapted, torch.float32).backward()
        optimizer.step()
    adapted.eval()
    assert loss_of(adapted, torch.float32).item() < 0.9 * first
    assert torch.equal(model(torch.arange(9)[None]).logits, words)
    adapted.unload()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saved_and_loaded_in_all_of_pefts_ways(tiny_llama, tmp_path):
    build(tiny_llama).save_pretrained(tmp_path / "model")
    adapted = add_lora(LMFusion.from_pretrained(tmp_path / "model"))
    expected = loss_of(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert f"base_model: {tmp_path / 'model'}" in (tmp_path / "adapter" / "README.md").read_text()

    with_adapter = LMFusion.from_pretrained(tmp_path / "model")
    with_adapter.load_adapter(str(tmp_path / "adapter"))
    for loaded in (
        PeftModel.from_pretrained(LMFusion.from_pretrained(tmp_path / "model"), tmp_path / "adapter"),
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["lmfusion.model.modeling"]),
        AutoModel.from_pretrained(tmp_path / "adapter"),
        with_adapter,
    ):
        assert torch.equal(loss_of(loaded), expected)


def test_transformers_own_add_adapter(tiny_llama):
    model = build(tiny_llama)
    base = loss_of(model)
    model.add_adapter(LoraConfig(target_modules=TARGETS))
    fill_b(model)
    assert {is_lora(name) for name, p in model.named_parameters() if p.requires_grad} == {True}
    assert abs(loss_of(model) - base) > 1e-3
    model.disable_adapters()
    assert torch.equal(loss_of(model), base)


def test_a_model_with_adapters_is_not_saved_as_one(tiny_llama, tmp_path):
    model = build(tiny_llama, torch.float32)
    adapted = add_lora(model, modules_to_save=["image.patch_coder"])
    for save in (model.save_pretrained, model.save_text):
        with pytest.raises(
            ValueError, match=r"adapters are on the model, first at image\.layers\.0\..*merge_and_unload"
        ):
            save(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    loss = loss_of(adapted, torch.float32)
    adapted.merge_and_unload().save_pretrained(tmp_path / "m")
    torch.testing.assert_close(loss_of(LMFusion.from_pretrained(tmp_path / "m"), torch.float32), loss)


# The rest of the image side


@pytest.mark.parametrize(
    ("patch_coder", "targets"),
    [
        ({"kind": "linear"}, r"image\.patch_coder\.(in_proj|out_proj|time_embedder\.mlp\.linear_\d)"),
        (UNET, r"image\.patch_coder\.(conv_in|conv_out|in_proj|out_proj|.*\.(conv1|conv2|time_emb_proj|op))"),
    ],
)
def test_the_patch_coder_takes_adapters(tiny_llama, patch_coder, targets):
    base = loss_of(build(tiny_llama, patch_coder=patch_coder))
    adapted = add_lora(build(tiny_llama, patch_coder=patch_coder), target_modules=f"{TARGETS}|{targets}")
    loss = loss_of(adapted)
    assert abs(loss - base) > 1e-3
    loss.backward()
    factors = {name: p for name, p in adapted.named_parameters() if is_lora(name)}
    assert any("patch_coder" in name for name in factors)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in factors.values())
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-10, atol=0)


def test_modules_to_save_are_trained_beside_the_adapter(tiny_llama):
    model = build(tiny_llama)
    base = loss_of(model)
    adapted = add_lora(model, fill=False, modules_to_save=["image.norm", "image.patch_coder"])
    assert torch.equal(loss_of(adapted), base) and model.frozen_text
    loss_of(adapted).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("image.norm.modules_to_save" in name for name in trained)
    assert any("patch_coder.modules_to_save" in name and "in_proj" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter *= 1.1
    assert abs(loss_of(adapted) - base) > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(loss_of(adapted), base)


# Refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "adapter 'default' has lora_dropout 0.1.*set lora_dropout=0"),
        ({"use_dora": True}, r"adapter 'default' is a variant of LoRA \(DoraLinearVariant\)"),
        ({"lora_bias": True}, "adapter 'default' has a bias; set lora_bias=False"),
        ({"target_modules": r"text\.layers\.1\.mlp\.down_proj"}, "LoRA is attached to the text tower"),
        ({"target_modules": ["qkv_proj"]}, "LoRA is attached to the text tower"),
        ({"target_modules": ["lm_head"]}, "LoRA is attached to the text tower"),
        ({"target_modules": ["embed_tokens"]}, "LoRA is attached to the text tower"),
        ({"target_modules": "all-linear"}, "LoRA is attached to the text tower"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_sum_of_weights_is_refused(tiny_llama, settings, message):
    adapted = add_lora(build(tiny_llama), **settings).train()
    with pytest.raises(ValueError, match=message):
        loss_of(adapted)


def test_biases_are_trained_on_the_image_side_alone(tmp_path, tokenizer):
    """Qwen2 has biases in both towers; peft's bias="all" would train the text tower's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocab_size = len(tokenizer) + 1  # transformers' class for Qwen2 adds <|endoftext|> to a tokenizer without it
    config = Qwen2Config(vocab_size=vocab_size, num_hidden_layers=1, max_position_embeddings=256, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    adapted = add_lora(build(tmp_path), bias="lora_only")
    loss = loss_of(adapted)
    loss.backward()
    biases = {name for name, p in adapted.named_parameters() if name.endswith("bias") and p.grad is not None}
    assert biases == {"base_model.model.image.layers.0.self_attn.qkv_proj.base_layer.bias"}
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="the text tower must be frozen or trained as a whole"):
        loss_of(add_lora(build(tmp_path), bias="all"))


def test_dropout_is_no_matter_outside_training(tiny_llama):
    adapted = add_lora(build(tiny_llama), lora_dropout=0.1).eval()
    loss = loss_of(adapted)
    torch.testing.assert_close(loss_of(adapted.merge_and_unload()), loss, rtol=1e-12, atol=0)


def test_variants_work_once_merged(tiny_llama):
    adapted = add_lora(build(tiny_llama), use_dora=True)
    with pytest.raises(ValueError, match="variant"):
        loss_of(adapted)
    with adapted.disable_adapter():
        base = loss_of(adapted)
    assert torch.isfinite(loss_of(adapted.merge_and_unload()) - base)


def test_other_kinds_of_adapter_are_refused(tiny_llama):
    for config in (peft.LoHaConfig(target_modules=TARGETS), peft.VeraConfig(target_modules=TARGETS)):
        with pytest.raises(ValueError, match=r"an adapter must be LoRA, got peft\.tuners\."):
            loss_of(get_peft_model(build(tiny_llama), config))


def test_an_adapter_a_row_is_refused(tiny_llama):
    model = build(tiny_llama)
    adapted = add_lora(model).eval()
    with pytest.raises(ValueError, match="adapter_names= gives every row its own adapter"):
        adapted(batch=make_batch(model), adapter_names=["default", "__base__"])


def test_llama_names_are_not_found(tiny_llama):
    """q, k and v are one matrix in memory."""
    with pytest.raises(ValueError, match=re.escape("q_proj")):
        add_lora(build(tiny_llama), target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="not found"):
        add_lora(build(tiny_llama, separation="none"))  # every layer is the text tower's


def test_nothing_warns(tiny_llama):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(add_lora(build(tiny_llama)))
