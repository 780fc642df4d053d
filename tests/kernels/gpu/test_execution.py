"""The block runs as GPU programs must: captured in graphs, compiled, on any stream and device."""

import pytest
import torch

import lmfusion_kernels as lk
from tests.kernels.gpu.support import (
    DEVICE,
    ON_GPU,
    assert_same_bits,
    block_inputs,
    capture,
    clone_layout,
    make_block,
    make_layout,
    needs_gpu,
    random,
    rope_of,
    run_block,
    synchronize,
)

DTYPE = torch.bfloat16


def test_graph_of_a_forward_replays_on_other_rows_and_layouts():
    """A graph has fixed shapes, but reads its rows and its mask again at every replay."""
    block, layout = make_block(DTYPE), clone_layout(make_layout("mixed"))
    rows, rope = block_inputs(layout, DTYPE)
    rope = tuple(table.clone() for table in rope)
    result = {}

    def forward():
        with torch.no_grad():
            result["text"], result["image"] = block(rows, layout, rope)

    replay = capture(forward)
    # The same counts of every kind of row, in another arrangement.
    other = lk.TokenLayout.from_spans(
        [[("text", 1)], [("marker", 1), ("image", 4), ("marker", 1), ("text", 200), ("image", 33), ("image", 1)],
         [("text", 5), ("marker", 1), ("image", 70), ("marker", 1), ("text", 13)]], device=DEVICE,
    )  # fmt: skip
    assert (other.num_text, other.num_constant) == (layout.num_text, layout.num_constant)
    new_rows, new_rope = block_inputs(other, DTYPE, seed=7)
    with torch.no_grad():
        expected = block(new_rows, other, new_rope)
    for name, value in vars(layout).items():
        if isinstance(value, torch.Tensor):
            value.copy_(getattr(other, name))
    for old, new in zip((*rows, *rope), (*new_rows, *new_rope), strict=True):
        old.copy_(new)
    replay()
    synchronize()
    assert_same_bits(result, {"text": expected[0], "image": expected[1]})


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_graph_of_forward_and_backward(frozen_text, recompute):
    block = make_block(DTYPE, frozen_text=frozen_text, qk_norm=True)
    layout = make_layout("mixed", frozen_text)
    rows, rope = block_inputs(layout, DTYPE)
    result = {}

    def step():
        result.update(run_block_on_device(block, rows, layout, rope, recompute))

    replay = capture(step)
    rows[0].copy_(random(*rows[0].shape, dtype=DTYPE, seed=20))
    rows[1].copy_(random(*rows[1].shape, dtype=DTYPE, seed=21))
    replay()
    synchronize()
    assert_same_bits(result, run_block_on_device(block, rows, layout, rope, recompute))


def run_block_on_device(block, rows, layout, rope, recompute):
    """Outputs and gradients of a loss that copies nothing from the host."""
    x = [t.detach().requires_grad_() for t in rows]
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    y_text, y_image = block((x[0], x[1]), layout, rope, recompute=recompute)
    loss = y_text[layout.num_constant :].float().square().sum() + y_image.float().square().sum()
    grads = torch.autograd.grad(loss, [*x, *trained.values()])
    return dict(zip(["y_text", "y_image", "x_text", "x_image", *trained], [y_text, y_image, *grads], strict=True))


def test_graph_of_a_denoising_step():
    """Only image rows, with the prompt in a cache: a denoising step."""
    block = make_block(DTYPE)
    weights = block.text.weights(DTYPE), block.image.weights(DTYPE)
    cache = tuple(random(2 * 128, 2, 64, dtype=DTYPE, seed=i) for i in range(2))
    place = {"cached_lengths": [40, 9], "cache_starts": [0, 128], "cache_slots": 256}
    layout = lk.TokenLayout.from_spans([[("image", 64)]] * 2, **place, device=DEVICE)
    rows, rope = block_inputs(layout, DTYPE)
    result = {}

    def step():
        with torch.no_grad():
            result["y"] = lk.routed_block(rows, layout, *weights, rope, kv_cache=cache)[1]

    replay = capture(step)
    rows[1].copy_(random(*rows[1].shape, dtype=DTYPE, seed=20))
    replay()
    synchronize()
    drawn = result["y"].clone()
    step()
    assert torch.equal(drawn, result["y"])


@pytest.mark.parametrize("frozen_text", [True, False], ids=["frozen", "trained"])
def test_compiled_by_inductor_without_graph_break(frozen_text):
    block = make_block(DTYPE, frozen_text=frozen_text)
    layout = make_layout("mixed", frozen_text)
    rows, rope = block_inputs(layout, DTYPE)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True)
    expected = run_block(block, rows, layout, rope)
    for name, value in run_block(block, rows, layout, rope, call=compiled).items():
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2, msg=lambda text, n=name: f"{n}: {text}")


@needs_gpu
def test_kernels_outside_attention(monkeypatch):
    """At most 12 kernels forward and 25 backward, with nothing frozen, and without QK norms and biases."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # its fills would be counted
    torch.manual_seed(0)
    block = lk.RoutedBlock(512, 1024, 8, 4, 64).to(DEVICE, DTYPE)
    layout = lk.TokenLayout.from_spans([[("text", 512), ("image", 512)]], frozen_text=False, device=DEVICE)
    rope = rope_of(layout, 64)
    x = random(1024, 512, dtype=DTYPE).requires_grad_()
    inputs = [x, *block.parameters()]
    dy = random(1024, 512, dtype=DTYPE, seed=1)
    torch.autograd.grad(block(x, layout, rope), inputs, dy)  # compiles
    y = None

    def forward():
        nonlocal y
        y = block(x, layout, rope)

    names = kernels_of(forward)
    assert len(names) <= 12, names
    names = kernels_of(lambda: torch.autograd.grad(y, inputs, dy))
    assert len(names) <= 25, names


def kernels_of(function) -> list[str]:
    """Names of the kernels, copies and fills that `function` launches, except those of attention and cuBLAS's sums."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [
        name
        for name in names
        if not any(part in name for part in ("attention", "join_splits", "flash", "splitKreduce"))
    ]


@needs_gpu
@pytest.mark.parametrize("train", [False, True], ids=["forward", "forward and backward"])
def test_work_goes_to_the_current_stream(train):
    """Rows become valid late on a side stream; a kernel on another stream would read NaN."""
    block, layout = make_block(DTYPE), make_layout("mixed")
    rows, rope = block_inputs(layout, DTYPE)

    def work(rows):
        if train:
            return run_block_on_device(block, rows, layout, rope, "none")
        with torch.no_grad():
            y = block(rows, layout, rope)
        return {"y_text": y[0], "y_image": y[1]}

    expected = work(rows)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = tuple(torch.full_like(t, float("nan")) for t in rows)
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        for target, source in zip(late, rows, strict=True):
            target.copy_(source)
        result = work(late)
    stream.synchronize()
    assert_same_bits(result, expected)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one():
    block, layout = make_block(DTYPE), make_layout("mixed")
    rows, rope = block_inputs(layout, DTYPE)
    expected = run_block_on_device(block, rows, layout, rope, "none")
    second = "cuda:1"
    moved = run_block_on_device(
        block.to(second), tuple(t.to(second) for t in rows), layout.to(second), tuple(t.to(second) for t in rope),
        "none",
    )  # fmt: skip
    for name, value in moved.items():
        assert value.device == torch.device(second)
        torch.testing.assert_close(value.to("cuda:0"), expected[name], rtol=1e-2, atol=1e-2)
