"""A loader gives the same batches if the codec is on the GPU, and copies them there without a wait of the host."""

import torch

from benchmarks.harness.tiny_model import build_tokenizer
from lmfusion.data.pipeline.loader import LoaderState
from tests.kernels.gpu.support import DEVICE, needs_gpu
from tests.lmfusion.data.pipeline.loaders import contents, packed_loader, read


def test_rows_are_those_of_a_loader_on_the_cpu():
    tokenizer = build_tokenizer()
    assert contents(read(packed_loader(tokenizer, device=DEVICE), 3)) == contents(read(packed_loader(tokenizer), 3))


@needs_gpu
def test_rows_are_copied_while_the_device_is_busy():
    (step,) = packed_loader(build_tokenizer(), device=DEVICE).steps(LoaderState(), 1)
    batch = step.batches[0]
    batch.to(DEVICE)  # memory is allocated the first time, which waits
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    before = torch.cuda.Event()
    before.record()
    copy = batch.to(DEVICE)
    assert not before.query()
    for name in ("latents", "noise", "timesteps", "token_ids", "labels"):
        assert torch.equal(getattr(copy, name).cpu(), getattr(batch, name)), name
