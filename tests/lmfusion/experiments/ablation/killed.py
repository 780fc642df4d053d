"""Runs an ablation in a process of its own, which kills itself at a given step."""

import os
import signal

import torch


def ablate_and_die(values, variant, step):
    """The ablation of a recipe's `values`, up to the step after `step` of a variant, killed before it."""
    from lmfusion.experiments.ablation.config import AblationConfig
    from lmfusion.experiments.ablation.measure import MeasuredTrainer
    from lmfusion.experiments.ablation.run import run_ablation
    from lmfusion.utils.config_values import from_values

    torch.set_num_threads(1)
    real = MeasuredTrainer._advance

    def advance(trainer, *args):
        if trainer.folder.name == variant and trainer.step == step:
            trainer.writer.finish()  # the checkpoint of this step is being written
            os.kill(os.getpid(), signal.SIGKILL)
        real(trainer, *args)

    MeasuredTrainer._advance = advance
    run_ablation(from_values(AblationConfig, values))
