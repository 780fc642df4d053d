"""Makes latents of a chosen step NaN."""

from dataclasses import replace


def poison(trainer, number):
    """Give one sample in the last sequence of step `number` latents that are NaN; the returned list gets its id."""
    real, poisoned = trainer.loader.steps, []

    def steps(state, num_steps):
        for i, step in enumerate(real(state, num_steps), trainer.step + 1):
            if i == number:
                batch = step.batches[-1]
                latents = batch.latents.clone()
                latents[1] = float("nan")
                poisoned.append(batch.sample_ids[1])
                step = replace(step, batches=[*step.batches[:-1], replace(batch, latents=latents)])
            yield step

    trainer.loader.steps = steps
    return poisoned
