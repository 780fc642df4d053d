"""Latents that are not numbers, at a chosen step of a run."""

from dataclasses import replace


def poison(trainer, number):
    """Let one sample of the last row of step `number` have latents that are not numbers; its id is in the answer."""
    real, poisoned = trainer.loader.steps, []

    def steps(state, num_steps):
        for i, step in enumerate(real(state, num_steps), trainer.step + 1):
            if i == number:
                row = step.batches[-1]
                latents = row.latents.clone()
                latents[1] = float("nan")
                poisoned.append(row.sample_ids[1])
                step = replace(step, batches=[*step.batches[:-1], replace(row, latents=latents)])
            yield step

    trainer.loader.steps = steps
    return poisoned
