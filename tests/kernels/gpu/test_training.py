"""Training on the GPU equals training on the CPU and resumes exactly; a whole model runs there."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lmfusion_kernels as lk
from tests.kernels.gpu.support import DEVICE, DOCUMENTS, make_block

NUM_STEPS = 6


def train(block: lk.RoutedBlock, device: str, start: int = 0, stop: int = NUM_STEPS, state: dict | None = None):
    """A few steps of AdamW on noise. Returns the losses and the state to resume from."""
    block = block.to(device)
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=1e-3)
    if state is not None:
        block.load_state_dict(state["block"])
        optimizer.load_state_dict(state["optimizer"])
    layout = lk.TokenLayout.from_spans(DOCUMENTS["mixed"], device=device)
    rope = lk.rope_tables(layout.position, (1e4 ** -torch.linspace(0, 1, 32)).to(device))
    losses = []
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, layout.num_tokens, 128, generator=generator).to(device)
        y = block(x, layout, rope)
        loss = (y - target)[layout.num_constant :].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {"block": block.state_dict(), "optimizer": optimizer.state_dict()}
    return losses, {k: {**v} for k, v in state.items()}


def test_losses_are_those_of_the_cpu():
    losses, _ = train(make_block(), DEVICE)
    expected, _ = train(make_block(), "cpu")
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] != losses[0]


def test_resumed_training_gives_the_same_bits():
    unbroken, final = train(make_block(), DEVICE)
    _, state = train(make_block(), DEVICE, stop=3)
    state = {name: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in part.items()}
             for name, part in state.items()}  # fmt: skip
    resumed, again = train(make_block(), DEVICE, start=3, state=state)
    assert resumed == unbroken[3:]
    for name, tensor in final["block"].items():
        assert torch.equal(tensor, again["block"][name]), name


# The whole model, if its dependencies are installed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("transformers", "diffusers", "gguf"):
        pytest.importorskip(module)
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.harness.tiny_model import build_tokenizer

    path = tmp_path_factory.mktemp("llama")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def build_model(folder: Path):
    from lmfusion.model.modeling import LMFusion

    model = LMFusion.from_llm(
        folder,
        image={"hidden_size": 32, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        diffusion={"prediction_type": "v_prediction"},
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def test_model_trains_as_on_the_cpu(folder):
    from lmfusion.model.batch import SpecialTokens, caption_first_document, image_first_document, pack

    losses, grads = [], []
    for device in ("cpu", DEVICE):
        model = build_model(folder).to(device)
        tokens = SpecialTokens.of(model.tokenizer, model.boi_token_id)
        num_rows = model.image.patch_coder.tokens_per_image(8, 8)
        documents = [
            caption_first_document((5, 6, 7), num_rows, tokens),
            image_first_document((8, 9), num_rows, tokens),
        ]
        latents, noise = torch.randn(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        batch = pack(documents, latents, noise, torch.tensor([10, 400]), frozen_text=True).to(model.device)
        loss = model(batch=batch).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_model_draws_and_describes_as_on_the_cpu(folder):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    results = []
    for device in ("cpu", DEVICE):
        model = build_model(folder).to(device)
        drawing = model.draw(["a seven", "two"], num_steps=4, sampler="ddim", guidance_scale=2.0)
        texts = model.caption([picture], max_new_tokens=6), model.generate(["ab"], max_new_tokens=6)[0].text
        results.append((np.stack([np.asarray(image) for image in drawing]).astype(int), texts))
    assert np.abs(results[0][0] - results[1][0]).max() <= 1
    assert results[0][1] == results[1][1]
