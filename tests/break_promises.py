"""Breaks the code behind each promise of docs/design.md, in a copy, and checks that its test then fails.

    python tests/break_promises.py        # all; exit code 0 only if every test passes as it is and fails once broken
    python tests/break_promises.py 3 6    # some

The copy is made of the checkout with its compiled libraries; nothing in the checkout is touched.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Breakage(NamedTuple):
    """One line of code that keeps a promise, and what somebody might write there instead."""

    promise: str
    test: str
    path: str
    right: str
    wrong: str


BREAKAGES = (
    Breakage(
        "1 text is bit-identical: the image side's norm is used for text too",
        "tests/lmfusion/model/test_modeling.py::test_training_does_not_change_a_bit_of_the_text_side",
        "lmfusion/model/modeling.py",
        "norms = (self.text.norm.weight.to(dtype), self.image.norm.weight.to(dtype))",
        "norms = (self.image.norm.weight.to(dtype), self.image.norm.weight.to(dtype))",
    ),
    Breakage(
        "1 text is bit-identical: the optimiser gets the text tower",
        "tests/lmfusion/training/test_trainer.py::test_frozen_text_does_not_change_by_a_bit",
        "lmfusion/model/pretrained.py",
        "self.text.requires_grad_(not frozen)",
        "self.text.requires_grad_(True)",
    ),
    Breakage(
        "2 caption loss reaches the image tower: gradients of live rows are cut",
        "tests/kernels/block/test_routed_block.py::test_text_loss_after_an_image_reaches_the_image_tower_through_frozen_text",
        "lmfusion_kernels/block/backward.py",
        "dys = [dy_text[num_constant:].contiguous(), dy_image.contiguous()]",
        "dys = [torch.zeros_like(dy_text[num_constant:]), dy_image.contiguous()]",
    ),
    Breakage(
        "3 frozen weights get no gradient: every weight's gradient is computed",
        "tests/kernels/block/test_routed_block.py::test_backward_flops_are_those_of_the_row_classes",
        "lmfusion_kernels/block/backward.py",
        "if want[name]:\n                grad[name] = torch.mm",
        "if True:\n                grad[name] = torch.mm",
    ),
    Breakage(
        "3 constant rows have no backward: they are taken for live ones",
        "tests/kernels/block/test_routed_block.py::test_backward_flops_are_those_of_the_row_classes",
        "lmfusion_kernels/layout/token_layout.py",
        "arguments = spans.kinds, spans.lengths, spans.documents, frozen_text",
        "arguments = spans.kinds, spans.lengths, spans.documents, False",
    ),
    Breakage(
        "4 who sees whom: images are causal",
        "tests/kernels/attention/test_hybrid_attention.py::test_visibility",
        "lmfusion_kernels/layout/token_layout.py",
        "num_tokens = counts[",
        'vectors["key_end"] = np.arange(1, counts["num_tokens"] + 1, dtype=np.int32)\n        num_tokens = counts[',
    ),
    Breakage(
        "4 who sees whom: documents see each other",
        "tests/kernels/attention/test_hybrid_attention.py::test_visibility",
        "lmfusion_kernels/layout/token_layout.py",
        "num_tokens = counts[",
        'vectors["key_start"] = np.zeros_like(vectors["key_start"])\n        num_tokens = counts[',
    ),
    Breakage(
        "5 batches of one kind: without images and labels the loss has no graph",
        "tests/lmfusion/model/test_modeling.py::test_batches_without_images_or_labels_have_a_loss_of_zero_with_a_graph",
        "lmfusion/model/modeling.py",
        "return 0.0 * torch.stack([tensor.flatten()[:1].float().sum() for tensor in unused]).sum()",
        "return torch.zeros(())",
    ),
    Breakage(
        "5 batches of one kind: the block forgets the constant rows where a batch has nothing else",
        "tests/kernels/block/test_routed_block.py::test_block_on_batches_of_one_kind",
        "lmfusion_kernels/block/forward.py",
        "    if num_constant:\n        constant = ",
        "    if num_constant and layout.num_active:\n        constant = ",
    ),
    Breakage(
        "6 the network is given the t of the noise: it is given 0",
        "tests/lmfusion/model/test_modeling.py::test_losses_are_those_of_the_parts",
        "lmfusion/model/modeling.py",
        "x_image, skip = self.encode_images(noisy, timesteps)",
        "x_image, skip = self.encode_images(noisy, torch.zeros_like(timesteps))",
    ),
    Breakage(
        "7 cached equals uncached: cached tokens are not counted",
        "tests/lmfusion/generation/test_engine.py::test_answers_are_those_of_the_specification",
        "lmfusion/generation/engine.py",
        "prefill.cached.length += prefill.document.num_tokens",
        "prefill.cached.length += prefill.document.num_tokens - 1",
    ),
    Breakage(
        "7 graph equals eager: a replay sees the documents of the step before",
        "tests/lmfusion/generation/test_graphs.py::test_documents_of_other_lengths_at_other_places",
        "lmfusion/generation/graphs.py",
        "if layout.position is self._loaded:",
        "if self._loaded is not None:",
    ),
    Breakage(
        "7 batched equals single: images get the numbers of the first one's sampler",
        "tests/lmfusion/generation/test_engine.py::test_batched_is_single",
        "lmfusion/generation/denoising.py",
        "numbers = [state.numbers[state.step] for state in states]",
        "numbers = [states[0].numbers[states[0].step] for state in states]",
    ),
    Breakage(
        "7 guidance in one forward equals two: the branches get other images' tokens",
        "tests/lmfusion/generation/test_engine.py::test_answers_are_those_of_the_specification",
        "lmfusion/generation/device_steps.py",
        "x_image = x_image.unflatten(0, (x.shape[0], -1)).index_select(0, branching.image)",
        "x_image = x_image.unflatten(0, (x.shape[0], -1)).index_select(0, branching.image.flip(0))",
    ),
    Breakage(
        "7 guidance goes towards the prompt: the branches are swapped",
        "tests/lmfusion/generation/test_engine.py::test_answers_are_those_of_the_specification",
        "lmfusion/generation/guidance.py",
        "else (scale, 0.0, 1 - scale)",
        "else (1 - scale, 0.0, scale)",
    ),
    Breakage(
        "8 a resumed run equals an unbroken one: the optimizer starts from zero",
        "tests/lmfusion/training/test_resume.py::test_resumed_run_equals_an_unbroken_one",
        "lmfusion/training/trainer.py",
        'self.optimizer.load_state_tensors(parts["optimizer"])',
        "pass",
    ),
    Breakage(
        "8 a resumed run equals an unbroken one: the data starts from the beginning",
        "tests/lmfusion/training/test_resume.py::test_resumed_run_equals_an_unbroken_one",
        "lmfusion/training/trainer.py",
        "self.loader.steps(self.progress.loader, max(0, last - self.step))",
        "self.loader.steps(LoaderState(), max(0, last - self.step))",
    ),
    Breakage(
        "8 what a sample sees is its own: noise is the same in every epoch",
        "tests/lmfusion/data/pipeline/test_loader.py",
        "lmfusion/data/pipeline/loader.py",
        'generator(self._seed, plan.ref.epoch, plan.sample_id, "noise")',
        'generator(self._seed, 0, plan.sample_id, "noise")',
    ),
    Breakage(
        "9 no pickle: a module reads one",
        "tests/packaging/test_no_pickle.py::test_no_pickle",
        "lmfusion/model/verification.py",
        "import torch\n",
        "import pickle\n\nimport torch\n",
    ),
    Breakage(
        "9 nothing is overwritten before its successor is complete: the old model is deleted first",
        "tests/lmfusion/model/test_saving.py::test_a_full_disk_keeps_the_old_model",
        "lmfusion/utils/folders.py",
        "    new_folder(new)\n",
        "    shutil.rmtree(path, ignore_errors=True)\n    new_folder(new)\n",
    ),
)


def passes(folder: Path, test: str) -> bool:
    """Whether `test` passes in the checkout at `folder`."""
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--benchmark-disable", test]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode not in (0, 1):  # neither passed nor failed: not a verdict
        raise SystemExit(f"{test} did not run:\n{result.stdout}\n{result.stderr}")
    return result.returncode == 0


def main(promises: list[str]) -> int:
    wanted = [b for b in BREAKAGES if not promises or b.promise.split()[0] in promises]
    num_unnoticed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        ignore = shutil.ignore_patterns(".git", ".venv", "build", "runs", "__pycache__", ".*_cache", ".hypothesis")
        shutil.copytree(ROOT, folder, ignore=ignore)
        good = {test: passes(folder, test) for test in dict.fromkeys(b.test for b in wanted)}
        for breakage in wanted:
            file = folder / breakage.path
            source = file.read_text(encoding="utf-8")
            if source.count(breakage.right) != 1:
                raise SystemExit(f"{breakage.path} no longer holds {breakage.right!r} once; mend this script")
            file.write_text(source.replace(breakage.right, breakage.wrong), encoding="utf-8")
            is_noticed = good[breakage.test] and not passes(folder, breakage.test)
            file.write_text(source, encoding="utf-8")
            num_unnoticed += not is_noticed
            print(f"{'noticed' if is_noticed else 'UNNOTICED':10} {breakage.promise}", flush=True)
    print(f"{len(wanted) - num_unnoticed} passed, {num_unnoticed} failed")
    return 1 if num_unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
