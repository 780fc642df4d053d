"""How is an autoencoder trained? One process, one loop; it resumes from its folder wherever it was stopped."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from lmfusion.data.pipeline.skip_log import SkipLog
from lmfusion.images.grid import make_grid, save_grid
from lmfusion.images.preprocessing import to_pil
from lmfusion.training import checkpoint
from lmfusion.training.config import TrainConfig, resolve_path
from lmfusion.training.distributed import World
from lmfusion.training.ema import EMA
from lmfusion.training.metrics import Clock
from lmfusion.training.optimizer import Optimizer, clip_gradients
from lmfusion.training.run_identity import check_identity
from lmfusion.training.step import NonFiniteError
from lmfusion.utils.config_values import to_values
from lmfusion.utils.devices import choose_device
from lmfusion.utils.files import locked, locked_if_exists, replace_text
from lmfusion.utils.json_lines import JsonLines
from lmfusion.utils.signals import stop_signals
from lmfusion.vae import losses
from lmfusion.vae.autoencoder import Autoencoder, build_discriminator, export, measure_latents
from lmfusion.vae.config import VAEConfig, VAETrainConfig
from lmfusion.vae.images import ImageBatch, ImageLoader
from lmfusion.vae.lpips import LPIPS
from lmfusion.vae.metrics import OPTIONAL_TERMS, StepMetrics, summarise

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
            raise ValueError("an autoencoder is trained by one process; start it without torchrun")
        self.config = config
        self.folder = Path(config.output)
        train, loss = config.train, config.loss
        self.device = choose_device(train.device, "train.device")
        self.autoencoder = Autoencoder(config.autoencoder, train.seed).to(self.device)
        if train.recompute:
            self.autoencoder.kl.enable_gradient_checkpointing()
        self.weights = dict(self.autoencoder.kl.named_parameters())
        self.optimizer = Optimizer(self.weights, _optimizer_config(train))
        self.ema = EMA(self.weights, train.ema_decay)
        self.lpips = None if loss.vgg16 is None else LPIPS(resolve_path(loss.vgg16)).to(self.device)
        self.discriminator = None
        if loss.gan_weight:
            self.discriminator = build_discriminator(config.autoencoder, loss, train.seed).to(self.device)
            self.discriminator_weights = dict(self.discriminator.named_parameters())
            self.discriminator_optimizer = Optimizer(self.discriminator_weights, _optimizer_config(train))
        self.loader = ImageLoader(config.data, config.autoencoder, train.seed)
        self.held_out = self._held_out_loader()
        self.writer = checkpoint.CheckpointWriter(
            self.folder / "checkpoints", config.checkpoint.keep_last, World(0, 1, self.device)
        )
        self.damage = SkipLog(self.folder / "damaged.jsonl", config.data.max_damaged)
        self.log = JsonLines(self.folder / "metrics.jsonl")
        self.gathered: list[StepMetrics] = []
        self.clock = Clock()
        self.step = 0
        """Updates made so far."""
        self._damage_before: dict[str, int] = {}
        with locked_if_exists(self.folder):
            self._resume()

    def run(self, max_steps: int | None = None) -> bool:
        """Train up to `num_steps` updates in all, or up to `max_steps` if that is less, and export the autoencoder.

        Answers whether it got there; False means that SIGTERM or SIGINT stopped it. Either way there is a checkpoint.
        """
        train = self.config.train
        last = train.num_steps if max_steps is None else min(max_steps, train.num_steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            self._resume()  # again where another run has gone on with it since
            stop = stack.enter_context(stop_signals())
            bar = tqdm(total=last, initial=self.step, unit="step", mininterval=1 if sys.stderr.isatty() else 30)
            progress = stack.enter_context(bar)
            start, end = self.step * train.batch_size, last * train.batch_size
            batches = stack.enter_context(closing(self.loader.batches(start, end, train.batch_size)))
            stack.callback(self.damage.close)
            stack.callback(self.log.close)
            stack.enter_context(self._saving_on_error())
            resolved = yaml.safe_dump(to_values(self.config), sort_keys=False, allow_unicode=True)
            replace_text(self.folder / "config.yaml", resolved)
            self.log.resume(self.step)
            self.damage.resume(self.step, self._damage_before)
            self.clock.start()
            while self.step < last and not stop.is_set:
                with self.clock.waiting():
                    batch = next(batches)
                metrics = self._update(batch)
                if self.held_out is not None and self.step % self.config.validation.every == 0:
                    with self.clock.paused():
                        metrics = dataclasses.replace(metrics, psnr=self.validate())
                self.gathered.append(metrics)
                progress.update()
                if self.step % train.log_every == 0:
                    self._write_line(progress)
                # Last, since it may end the run: the checkpoint that is then saved has all of this step
                self.damage.add(self.step, len(batch.sample_ids) + len(batch.damaged), batch.damaged)
                self.writer.poll()
                if self.step % self.config.checkpoint.every == 0:
                    self.save_checkpoint()
            self.save_checkpoint()
            self.writer.finish()
            if self.step < last:
                return False
            self.export()
            return True

    def _write_line(self, progress: "tqdm[Any]") -> None:
        line = summarise(self.step, self.epoch, self.gathered, *self.clock.take())
        self.gathered = []
        self.log.append(dataclasses.asdict(line))
        shown = {"l1": f"{line.l1:.4f}", "images/s": f"{line.images_per_second:.1f}"}
        progress.set_postfix(shown, refresh=False)

    @property
    def epoch(self) -> float:
        """How often the data has been gone through."""
        return self.step * self.config.train.batch_size / self.loader.num_samples

    @contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """Images that cannot be read or a loss that is not finite cost none of the steps before them."""
        try:
            yield
        except ValueError:
            with suppress(OSError):  # the first error is the one to tell
                self.save_checkpoint()
                self.writer.finish()
            raise

    def _update(self, batch: ImageBatch) -> StepMetrics:
        """One step: gradients of the autoencoder, then those of its adversary, then the updates of both."""
        if not batch.sample_ids:
            raise ValueError(f"step {self.step}: no image of the batch can be read; take the damaged ones out")
        images = batch.images.to(self.device, non_blocking=True)
        terms, reconstructions = self._backward(images, batch.noise.to(self.device, non_blocking=True))
        terms["grad_norm"] = clip_gradients(self.weights.values(), self.config.train.max_grad_norm)
        if self._is_adversarial:
            terms |= self._discriminator_backward(images, reconstructions)
        # The only wait for the device in a step
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
        return StepMetrics(
            num_images=len(batch.sample_ids),
            num_damaged=self.damage.num_damaged + len(batch.damaged),
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
        """Gradients of the autoencoder; the terms of its loss and the reconstructions, detached."""
        weights = self.config.loss
        with self._autocast():
            posterior = self.autoencoder.encode(images)
            reconstructions = self.autoencoder.decode(posterior.draw(noise))
            terms = {"l1": losses.l1(reconstructions, images), "kl": posterior.kl()}
            loss = terms["l1"]
            if self.lpips is not None:
                terms["lpips"] = self.lpips(reconstructions, images).mean()
                loss = loss + weights.lpips_weight * terms["lpips"]
            if self._is_adversarial:
                assert self.discriminator is not None
                self.discriminator.requires_grad_(False)  # here it only judges
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
        """PSNR of the held-out images in decibels, with the averaged weights and in float32; draws the picture too."""
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
        """Begin to save what `VAETrainer` needs to continue from here."""
        self.log.sync()
        state = {
            "run": self._identity(),
            "gathered": [dataclasses.asdict(step) for step in self.gathered],
            "clock": self.clock.so_far(),
            "damage": self.damage.state(),
        }
        self.writer.save(self.step, self._parts(), state)

    def _parts(self) -> checkpoint.Parts:
        parts: dict[str, Mapping[str, Tensor | checkpoint.Slice]] = {
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
        parts, state = checkpoint.load_checkpoint(path)
        check_identity(self._identity(), state["run"], path)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(parts["weights"][name])
            self.optimizer.load_state_tensors(parts["optimizer"])
            self.ema.load_state_tensors(parts["ema"])
            if self.discriminator is not None:
                for name, weight in self.discriminator_weights.items():
                    weight.copy_(parts["discriminator"][name])
                self.discriminator_optimizer.load_state_tensors(parts["discriminator_optimizer"])
        self.gathered = [StepMetrics(**step) for step in state["gathered"]]
        self.clock = Clock(*state["clock"])
        self._damage_before = state["damage"]
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change on the way, by its key in the configuration."""
        train, loss = self.config.train, to_values(self.config.loss)
        loss.pop("vgg16")  # files may be moved
        identity: dict[str, Any] = {"autoencoder": to_values(self.config.autoencoder), "loss": loss}
        identity |= {f"train.{key}": getattr(train, key) for key in ("seed", "batch_size", "dtype")}
        sources = [to_values(source) for source in self.config.data.sources]
        identity["data.sources"] = [{k: v for k, v in source.items() if k != "path"} for source in sources]
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
                raise ValueError("validation.sources: no image can be read; `lmfusion data check` tells why")
        return loader


def _optimizer_config(config: VAETrainConfig) -> TrainConfig:
    """What an optimizer reads of a training's configuration."""
    names = ("num_steps", "learning_rate", "min_learning_rate", "warmup_steps", "betas", "eps", "weight_decay")
    return TrainConfig(**{name: getattr(config, name) for name in names})
