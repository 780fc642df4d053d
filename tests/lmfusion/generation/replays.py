"""Steps to record and replay on any device, for different documents of one shape, and the check of their results."""

import dataclasses
import functools

import torch

import lmfusion_kernels as lk
from lmfusion.generation.cache import KeyValueCache
from lmfusion.generation.decoding import SamplingParams
from lmfusion.generation.device_steps import Branching, decode_step, denoise_step
from lmfusion.generation.graphs import ReplayedStep
from lmfusion.model.modeling import LMFusion

NUM_SLOTS, NUM_SCRATCH = 144, 16
LIMIT = 256
"""Most tokens of a document."""


def make_model(folder, device="cpu"):
    """A model around the LLM in `folder` whose every weight matters."""
    model = LMFusion.from_llm(
        folder,
        image={"hidden_size": 16, "patch_coder": {"kind": "linear"}},
        codec={"kind": "pixels", "channels": 1, "image_size": 8},
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter += 0.2 * random(*parameter.shape)
    return model.eval().to(device)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_cache(model):
    cache = KeyValueCache(model, NUM_SLOTS, NUM_SCRATCH)
    for i, buffers in enumerate(cache.layers):
        for j, buffer in enumerate(buffers):
            buffer.copy_(random(*buffer.shape, seed=2 * i + j))
    return cache


def layout_of(span, lengths, starts, num_padding=0):
    """A layout, on the host, of documents that continue with `span`, and of padding documents in the scratch slots."""
    return lk.TokenLayout.from_spans(
        [[span]] * (len(lengths) + num_padding),
        cached_lengths=[*lengths, *[0] * num_padding],
        cache_starts=[*starts, *[NUM_SLOTS] * num_padding],
        cache_slots=NUM_SLOTS + NUM_SCRATCH,
    )


@dataclasses.dataclass
class Call:
    """Arguments of a step, on the host, and the number of its results that do not belong to padding."""

    arguments: tuple
    num_real: int


def decode_calls(documents):
    """A call for each (lengths, starts, number of padding documents)."""
    calls = []
    for seed, (lengths, starts, num_padding) in enumerate(documents):
        num = len(lengths) + num_padding
        generator = torch.Generator().manual_seed(seed)
        params = SamplingParams(
            allow_boi=torch.ones(num),
            temperature=torch.rand(num, generator=generator).round(decimals=0) * 0.7,
            top_p=torch.rand(num, generator=generator),
            top_k=torch.randint(1, 300, (num,), generator=generator),
            uniform=torch.rand(num, generator=generator),
        )
        token_ids = torch.randint(0, 250, (num,), generator=generator)
        layout = layout_of(("text", 1), lengths, starts, num_padding)
        calls.append(Call((token_ids, layout, params, False), len(lengths)))
    return calls


def denoise_calls():
    """Two images, the first of them guided: three branches."""
    calls = []
    for seed, (lengths, starts) in enumerate([([40, 17, 3], [0, 60, 100]), ([20, 3, 26], [5, 44, 90])]):
        x, x0, noise = (random(2, 1, 8, 8, seed=10 * seed + i) for i in range(3))
        numbers = torch.cat([torch.tensor([[900.0 - seed], [3.0]]), random(2, 6, seed=seed)], dim=1)
        branching = Branching(
            image=torch.tensor([0, 1, 0]),
            branch=torch.tensor([[0, 2, 0], [1, 1, 1]]),
            weights=torch.tensor([[1.5 + seed, -0.5 - seed, 0.0], [1.0, 0.0, 0.0]]),
            rescale=torch.tensor([0.3, 0.0]),
        )
        calls.append(Call((x, x0, noise, numbers, layout_of(("image", 16), lengths, starts), branching, 1.0), 2))
    return calls


def unguided_denoise_calls():
    """Images without other branches, some of them padding."""
    calls = []
    for seed, (lengths, starts, num_padding) in enumerate(
        [([40, 17, 3], [0, 60, 100], 0), ([48, 0], [1, 80], 1), ([17], [3], 2)]
    ):
        x, x0, noise = (random(3, 1, 8, 8, seed=10 * seed + i) for i in range(3))
        numbers = torch.cat([torch.tensor([[999.0 - 7 * seed], [500.0], [3.0]]), random(3, 6, seed=seed)], dim=1)
        layout = layout_of(("image", 16), lengths, starts, num_padding)
        calls.append(Call((x, x0, noise, numbers, layout, None, 1.0), len(lengths)))
    return [*calls, calls[-1]]  # the last one's layout is loaded already


STEPS = {
    "decode": (decode_step, lambda: decode_calls([
        ([40, 17, 3], [0, 50, 90], 0), ([41, 18, 4], [0, 50, 90], 0), ([35, 0, 60], [5, 44, 70], 0),
        ([60, 34], [2, 70], 1), ([33], [100], 2),
    ])),
    "guided denoise": (denoise_step, denoise_calls),
    "denoise": (denoise_step, unguided_denoise_calls),
}  # fmt: skip


def assert_replayed(model, recorder, step, calls, num_graphs=1, tolerance=0.0, replaying=None):
    """Every call returns what the step returns and leaves the same cache; there are `num_graphs` graphs.

    replaying: a context in which calls that are not recorded run.
    """
    eager_cache, cache = make_cache(model), make_cache(model)
    eager = ReplayedStep(functools.partial(step, model, eager_cache), model.device, None)
    replayed = ReplayedStep(functools.partial(step, model, cache), model.device, recorder, longest_document=LIMIT)
    answers = []
    for i, call in enumerate(calls):
        expected = eager(*call.arguments)
        if replaying is not None and i >= num_graphs:
            with replaying():
                answer = replayed(*call.arguments)
        else:
            answer = replayed(*call.arguments)
        answers.append((answer, expected, call.num_real))
        for own, other in zip(cache.layers, eager_cache.layers, strict=True):
            for one, two in zip(own, other, strict=True):
                torch.testing.assert_close(one[:NUM_SLOTS], two[:NUM_SLOTS], rtol=tolerance, atol=tolerance)
    assert (replayed.num_recorded, replayed.num_replayed) == (num_graphs, len(calls) - num_graphs)
    for answer, expected, num_real in answers:  # later calls must not have overwritten them
        for one, two in zip(*(x if isinstance(x, tuple) else (x,) for x in (answer, expected)), strict=True):
            torch.testing.assert_close(one[:num_real], two[:num_real], rtol=tolerance, atol=tolerance)
