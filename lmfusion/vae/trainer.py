"""The training loop of an autoencoder, in one process; a run resumes from its folder."""

import dataclasses
import math
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmfusion.data.pipeline.skip_log import SkipLog
from lmfusion.images.grid import make_grid, save_grid
from lmfusion.images.preprocessing import to_pil
from lmfusion.training.checkpoint import CheckpointWriter, Parts, load_checkpoint, restore
from lmfusion.training.distributed import World
from lmfusion.training.ema import EMA
from lmfusion.training.optimizer import Optimizer, clip_gradients
from lmfusion.training.run_identity import check_identity, sources_identity
from lmfusion.training.session import run_session, saving_on
from lmfusion.training.step import NonFiniteError
from lmfusion.training.step_log import StepLog
from lmfusion.utils.config_values import to_values
from lmfusion.utils.devices import choose_device
from lmfusion.utils.files import locked_if_exists
from lmfusion.utils.recipes import resolve_path
from lmfusion.vae import losses
from lmfusion.vae.autoencoder import Autoencoder, build_discriminator, export, measure_latents
from lmfusion.vae.config import VAEConfig
from lmfusion.vae.images import ImageBatch, ImageLoader
from lmfusion.vae.lpips import LPIPS
from lmfusion.vae.metrics import OPTIONAL_TERMS, VAEStepMetrics, summarise

NUM_MEASURED = 1024
"""Training images, at most, that the scale of the latents is measured on."""
NUM_SHOWN = 8
"""Held-out images in a picture."""


class VAETrainer:
    """One training of an autoencoder. The same configuration continues the run that its output folder holds.

    Raises ValueError or OSError for a configuration, data or files that cannot be used.
    """

    def __init__(self, config: VAEConfig) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("an autoencoder must be trained by one process; start it without torchrun")
        self.config = config
        self.folder = Path(config.output)
        train, loss = config.train, config.loss
        self.device = choose_device(train.device, "train.device")
        self.autoencoder = Autoencoder(config.autoencoder, train.seed).to(self.device)
        if train.recompute:
            self.autoencoder.kl.enable_gradient_checkpointing()
        self.weights = dict(self.autoencoder.kl.named_parameters())
        self.optimizer = Optimizer(self.weights, train)
        self.ema = EMA(self.weights, train.ema_decay)
        self.lpips = None if loss.vgg16 is None else LPIPS(resolve_path(loss.vgg16)).to(self.device)
        self.discriminator = None
        if loss.gan_weight:
            self.discriminator = build_discriminator(config.autoencoder, loss, train.seed).to(self.device)
            self.discriminator_weights = dict(self.discriminator.named_parameters())
            self.discriminator_optimizer = Optimizer(self.discriminator_weights, train)
        self.loader = ImageLoader(config.data, config.autoencoder, train.seed)
        self.held_out = self._held_out_loader()
        self.world = World(0, 1, self.device)
        self.writer = CheckpointWriter(self.folder / "checkpoints", config.checkpoint.keep_last, self.world)
        self.skip_log = SkipLog(self.folder / "damaged.jsonl", config.data.max_damaged)
        self.log = StepLog(self.folder, VAEStepMetrics)
        self.step = 0
        """Updates made so far."""
        self._num_skipped: dict[str, int] = {}
        """What the checkpoint that this process resumed from holds of the skip log."""
        with locked_if_exists(self.folder):
            self._resume()

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step * self.config.train.batch_size / self.loader.num_samples

    def run(self, max_steps: int | None = None) -> bool:
        """Train up to `num_steps` updates in all, or up to `max_steps` if that is less, and export the autoencoder.

        Returns whether it got there; False means that SIGTERM or SIGINT stopped it. Either way there is a checkpoint.
        """
        train = self.config.train
        last = train.num_steps if max_steps is None else min(max_steps, train.num_steps)
        with run_session(self.config, self.world, self._resume) as stop:
            self.skip_log.resume(self.step, self._num_skipped)
            start, end = self.step * train.batch_size, last * train.batch_size
            try:
                with (
                    closing(self.loader.batches(start, end, train.batch_size)) as batches,
                    saving_on(ValueError, self._save_and_finish),
                ):
                    self.log.open(self.step, last)
                    for batch in self.log.waiting(batches):
                        self._advance(batch)
                        if stop.is_set:
                            break
                    self._save_and_finish()
            finally:
                self.log.close()
                self.skip_log.close()
            if self.step < last:
                return False
            self.export()
            return True

    def _advance(self, batch: ImageBatch) -> None:
        """One step, and what is due after it."""
        config = self.config
        metrics = self._update(batch)
        if self.held_out is not None and self.step % config.validation.every == 0:
            with self.log.stopwatch.paused():
                metrics = dataclasses.replace(metrics, psnr=self.validate())
        self.log.gather([metrics])
        self.log.advance()
        if self.step % config.train.log_every == 0:
            line = summarise(self.step, self.epoch, *self.log.take())
            self.log.write(line, l1=f"{line.l1:.4f}", images_per_second=f"{line.images_per_second:.1f}")
        # After everything else of the step, since it may end the run: the checkpoint that is then saved has all of it
        self.skip_log.add(self.step, len(batch.sample_ids) + len(batch.damaged), batch.damaged)
        self.writer.poll()
        if self.step % config.checkpoint.every == 0:
            self.save_checkpoint()

    def _update(self, batch: ImageBatch) -> VAEStepMetrics:
        """Gradients of the autoencoder, then those of the discriminator, then the updates of both."""
        if not batch.sample_ids:
            raise ValueError(f"step {self.step}: no image of the batch can be read; remove the damaged ones")
        images = batch.images.to(self.device, non_blocking=True)
        terms, reconstructions = self._backward(images, batch.noise.to(self.device, non_blocking=True))
        terms["grad_norm"] = clip_gradients(self.weights.values(), self.config.train.max_grad_norm)
        if self._is_adversarial:
            terms |= self._discriminator_backward(images, reconstructions)
        # The only wait for the device in a step: one copy for all terms
        values = dict(zip(terms, torch.stack([term.detach().float() for term in terms.values()]).tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            names = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise NonFiniteError(
                f"step {self.step}: not finite: {names}; no update was made. "
                f"Lower train.learning_rate, or look at the samples: {', '.join(batch.sample_ids)}"
            )
        rate = self.optimizer.step(self.step)
        if self._is_adversarial:
            self.discriminator_optimizer.step(self.step)
        self.ema.update(self.step)
        self.step += 1
        optional = {name: values.pop(name, None) for name in OPTIONAL_TERMS}
        return VAEStepMetrics(
            num_images=len(batch.sample_ids),
            num_damaged=self.skip_log.num_damaged + len(batch.damaged),
            learning_rate=rate,
            **optional,
            **values,
        )

    @property
    def _is_adversarial(self) -> bool:
        return self.discriminator is not None and self.step >= self.config.loss.gan_start

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.config.train.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _backward(self, images: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Compute gradients of the autoencoder; returns the terms of its loss and the reconstructions, detached."""
        weights = self.config.loss
        with self._autocast():
            posterior = self.autoencoder.encode(images)
            reconstructions = self.autoencoder.decode(posterior.sample(noise))
            terms = {"l1": losses.l1(reconstructions, images), "kl": posterior.kl()}
            loss = terms["l1"]
            if self.lpips is not None:
                terms["lpips"] = self.lpips(reconstructions, images).mean()
                loss = loss + weights.lpips_weight * terms["lpips"]
            if self._is_adversarial:
                assert self.discriminator is not None
                self.discriminator.requires_grad_(False)  # it is trained in _discriminator_backward only
                terms["gan"] = losses.generator_loss(self.discriminator(reconstructions))
                last_layer = self.autoencoder.last_layer
                terms["gan_weight"] = losses.adaptive_gan_weight(loss, terms["gan"], last_layer)
                self.discriminator.requires_grad_(True)
                loss = loss + weights.gan_weight * terms["gan_weight"] * terms["gan"]
            loss = loss + weights.kl_weight * terms["kl"] * (noise.numel() / images.numel())
        loss.backward()
        return {"loss": loss.detach(), **terms}, reconstructions.detach()

    def _discriminator_backward(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        assert self.discriminator is not None
        with self._autocast():
            loss = losses.discriminator_loss(self.discriminator(images), self.discriminator(reconstructions))
        loss.backward()
        norm = clip_gradients(self.discriminator_weights.values(), self.config.train.max_grad_norm)
        return {"discriminator_loss": loss, "discriminator_grad_norm": norm}

    @torch.no_grad()
    def validate(self) -> float:
        """PSNR of the held-out images in decibels, with the averaged weights in float32; also saves the picture."""
        assert self.held_out is not None
        validation = self.config.validation
        ratios: list[float] = []
        shown: list[Tensor] = []
        with self.ema.applied():
            num_images = min(validation.num_samples, self.held_out.num_samples)
            for batch in self.held_out.batches(0, num_images, self.config.train.batch_size):
                if not batch.sample_ids:
                    continue
                images = batch.images.to(self.device)
                reconstructions = self.autoencoder.decode(self.autoencoder.encode(images).mean)
                ratios += losses.psnr(reconstructions, images).tolist()
                if len(shown) < NUM_SHOWN:
                    shown += torch.stack([images, reconstructions], dim=1).cpu()
        originals, reconstructed = zip(*shown[:NUM_SHOWN], strict=True)
        grid = make_grid(to_pil(torch.stack(originals + reconstructed)), num_columns=len(originals))
        save_grid(grid, self.folder / "reconstructions" / f"step-{self.step:08d}.png")
        return sum(ratios) / len(ratios)

    def export(self) -> None:
        """Write the autoencoder, with its averaged weights and the scale of its latents, into <output>/autoencoder."""
        num_images = min(NUM_MEASURED, self.loader.num_samples)
        batches = self.loader.batches(0, num_images, self.config.train.batch_size)
        with self.ema.applied():
            images = (batch.images.to(self.device) for batch in batches if batch.sample_ids)
            mean, std = measure_latents(self.autoencoder, images)
            export(self.autoencoder, self.folder / "autoencoder", mean, std)

    def save_checkpoint(self) -> None:
        """Begin to save what `VAETrainer` needs to continue from here; `writer` completes it."""
        state = {"run": self._identity(), "skipped": self.skip_log.state(), "log": self.log.state()}
        self.writer.save(self.step, self._parts(), state)

    def _save_and_finish(self) -> None:
        self.save_checkpoint()
        self.writer.finish()

    def _parts(self) -> Parts:
        parts: dict[str, Any] = {
            "weights": self.weights,
            "optimizer": self.optimizer.state_tensors(),
            "ema": self.ema.state_tensors(),
        }
        if self.discriminator is not None:
            parts["discriminator"] = self.discriminator_weights
            parts["discriminator_optimizer"] = self.discriminator_optimizer.state_tensors()
        return parts

    def _resume(self) -> None:
        path = self.writer.find()
        if path is None:
            return
        parts, state = load_checkpoint(path)
        check_identity(self._identity(), state["run"], path)
        restore(self.weights, parts["weights"])
        self.optimizer.load_state_tensors(parts["optimizer"])
        self.ema.load_state_tensors(parts["ema"])
        if self.discriminator is not None:
            restore(self.discriminator_weights, parts["discriminator"])
            self.discriminator_optimizer.load_state_tensors(parts["discriminator_optimizer"])
        self.log.load_state(state["log"])
        self._num_skipped = state["skipped"]
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        """What may not change when the run is resumed, by its key in the configuration."""
        train, loss = self.config.train, to_values(self.config.loss)
        loss.pop("vgg16")  # files may be moved
        identity: dict[str, Any] = {"autoencoder": to_values(self.config.autoencoder), "loss": loss}
        identity |= {f"train.{key}": getattr(train, key) for key in ("seed", "batch_size", "dtype")}
        identity["data.sources"] = sources_identity(self.config.data.sources)
        identity["data.shuffle_blocks"] = self.config.data.shuffle_blocks
        return identity | {"number of samples": self.loader.num_samples}

    def _held_out_loader(self) -> ImageLoader | None:
        if not self.config.validation.sources:
            return None
        data = dataclasses.replace(self.config.data, sources=self.config.validation.sources, shuffle_blocks=None)
        loader = ImageLoader(data, self.config.autoencoder, seed=0)
        num_images = min(self.config.validation.num_samples, loader.num_samples)
        with closing(loader.batches(0, num_images, self.config.train.batch_size)) as batches:
            if not any(batch.sample_ids for batch in batches):
                raise ValueError("validation.sources: no image can be read; `lmfusion data check` gives the reasons")
        return loader
