"""How is the image side trained? One process, one loop; it resumes from its folder wherever it was stopped."""

import hashlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from tqdm import tqdm

from lmfusion.batch import Batch, SpecialTokens
from lmfusion.config_values import to_values
from lmfusion.data import load_source
from lmfusion.data.loader import BatchLoader
from lmfusion.devices import choose_device
from lmfusion.files import locked, replace_text
from lmfusion.modeling import LMFusion
from lmfusion.serialization import digests, text_tensors
from lmfusion.training import checkpoint
from lmfusion.training.config import ModelConfig, RunConfig, TrainConfig, resolve_path
from lmfusion.training.ema import EMA
from lmfusion.training.metrics import MetricsLog, StepMetrics, Stopwatch
from lmfusion.training.optimizer import Optimizer, clip_gradients
from lmfusion.training.sampling import draw_grid, save_grid


class NonFiniteError(ValueError):
    """A loss or gradient that is infinite or not a number; the update it would have made was not made."""


class Trainer:
    """One training run. The same configuration continues the run that its output folder holds.

    Raises ValueError or OSError for a configuration, data or files that cannot be used.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.model = build_model(config.model, config.train)
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.loader = self._build_loader()
        self.optimizer = Optimizer(self.weights, config.train)
        self.ema = EMA(self.weights, config.train.ema_decay)
        self.log = MetricsLog(self.folder / "metrics.jsonl", config.train.log_every)
        self.step = 0
        """Updates made so far."""
        self._resume()

    def run(self, max_steps: int | None = None) -> bool:
        """Train up to `num_steps` updates in all, or up to `max_steps` if that is less, and export the model.

        Answers whether it got there; False means that SIGTERM or SIGINT stopped it. Either way there is a checkpoint.
        """
        train = self.config.train
        last = train.num_steps if max_steps is None else min(max_steps, train.num_steps)
        self.folder.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(to_values(self.config), sort_keys=False, allow_unicode=True)
        replace_text(self.folder / "config.yaml", resolved)
        self.model.train()
        progress = tqdm(total=last, initial=self.step, unit="step", mininterval=1 if sys.stderr.isatty() else 30)
        watch = Stopwatch()
        with locked(self.folder), stop_signals() as stop, progress, self._saving_on_error():
            for micro_batches in self.loader.steps(self.step, last):
                data_wait = watch.lap()
                metrics = self._update(micro_batches)
                metrics.data_wait_seconds = data_wait
                metrics.seconds = data_wait + watch.lap()
                line = self.log.add(self.step, self.loader.epoch(self.step), metrics)
                progress.update()
                if line is not None:
                    progress.set_postfix(loss=f"{line.loss:.4f}", images_per_second=f"{line.images_per_second:.0f}")
                if self.step % self.config.checkpoint.every == 0 or stop.is_set:
                    self.save_checkpoint()
                if self.config.sample.prompts and self.step % self.config.sample.every == 0:
                    self._draw_samples()
                if stop.is_set:
                    break
                watch.lap()
        self.save_checkpoint()
        self.log.close()
        if self.step < last:
            return False
        with self.ema.applied():
            self.model.eval().save_pretrained(
                self.folder / "model", parts="image" if self._is_text_the_bases else "all"
            )
        return True

    @property
    def _is_text_the_bases(self) -> bool:
        """Whether the text tower is certainly the base LLM's: then the model is saved without it."""
        return self.model.base is not None and not self.model.base.may_differ

    @contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """A sample that cannot be read or a loss that is not finite costs none of the steps before it."""
        try:
            yield
        except (ValueError, OSError):
            with suppress(OSError):  # the first error is the one to tell
                self.save_checkpoint()
            raise

    def _update(self, micro_batches: list[Batch]) -> StepMetrics:
        """One step: gradients of all micro-batches, then one update. Micro-batches of any size add up to the same."""
        num_labels = sum(batch.num_labels for batch in micro_batches)
        num_images = sum(batch.num_images for batch in micro_batches)
        loss_weight = self.model.config.diffusion.loss_weight
        sums = []
        for batch in micro_batches:
            output = self.model(batch=batch.to(self.model.device))
            loss = output.lm_loss_sum / max(1, num_labels) + loss_weight * output.diffusion_loss_sum / num_images
            loss.backward()
            sums.append(torch.stack([output.lm_loss_sum.detach(), output.diffusion_loss_sum.detach()]))
        norm = clip_gradients(self.weights.values(), self.config.train.max_grad_norm)
        # The only wait for the device in a step
        (grad_norm, _), *loss_sums = torch.stack([torch.stack([norm, norm]), *sums]).tolist()
        self._check_finite(micro_batches, grad_norm, loss_sums)
        lm_loss_sum, diffusion_loss_sum = (sum(column) for column in zip(*loss_sums, strict=True))
        rate = self.optimizer.step(self.step)
        self.ema.update(self.step)
        self.step += 1
        return StepMetrics(
            loss=lm_loss_sum / max(1, num_labels) + loss_weight * diffusion_loss_sum / num_images,
            lm_loss_sum=lm_loss_sum,
            num_labels=num_labels,
            diffusion_loss_sum=diffusion_loss_sum,
            num_images=num_images,
            grad_norm=grad_norm,
            learning_rate=rate,
        )

    def _check_finite(self, micro_batches: list[Batch], grad_norm: float, loss_sums: list[list[float]]) -> None:
        bad = [batch for batch, sums in zip(micro_batches, loss_sums, strict=True) if not math.isfinite(sum(sums))]
        if not bad and math.isfinite(grad_norm):
            return
        what = "loss" if bad else "gradient"
        sample_ids = [sample_id for batch in bad or micro_batches for sample_id in batch.sample_ids]
        raise NonFiniteError(
            f"step {self.step}: the {what} is not finite; no update was made. "
            f"Lower train.learning_rate, or look at the samples: {', '.join(sample_ids)}"
        )

    def _draw_samples(self) -> None:
        with self.ema.applied():
            grid = draw_grid(self.model.eval(), self.config.sample)
        self.model.train()
        save_grid(grid, self.folder / "samples" / f"step-{self.step:08d}.png")

    def save_checkpoint(self) -> None:
        """Save what `Trainer` needs to continue from here."""
        parts: checkpoint.Parts = {
            "weights": self.weights,
            "optimizer": self.optimizer.state_tensors(),
            "ema": self.ema.state_tensors(),
        }
        state = {"run": self._identity(), "base_sha256": self._base_digest(), "gathered": self.log.state()}
        checkpoint.save_checkpoint(self._checkpoints, self.step, parts, state, self.config.checkpoint.keep_last)

    def _resume(self) -> None:
        steps = checkpoint.list_steps(self._checkpoints)
        if not steps:
            self.log.resume(0, [])
            return
        path = checkpoint.checkpoint_path(self._checkpoints, steps[-1])
        parts, state = checkpoint.load_checkpoint(path)
        identity = self._identity()
        changed = [key for key, value in state["run"].items() if identity[key] != value]
        if changed:
            was = ", ".join(f"{key} was {state['run'][key]!r}, is {identity[key]!r}" for key in changed)
            raise ValueError(f"{path} belongs to another run: {was}. Change it back, or set output to another folder")
        if state["base_sha256"] != self._base_digest():
            raise ValueError(f"{path} belongs to another base LLM; point model.base to the one it was made with")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(parts["weights"][name])
        self.optimizer.load_state_tensors(parts["optimizer"])
        self.ema.load_state_tensors(parts["ema"])
        self.log.resume(state["step"], state["gathered"])
        self.step = state["step"]

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change on the way, by its key in the configuration."""
        model, train, data = self.model.config, self.config.train, self.config.data
        sections = {"image": model.image, "codec": model.codec, "diffusion": model.diffusion}
        identity = {f"model.{name}": to_values(section) for name, section in sections.items()}
        identity["model.codec"].pop("path")  # files may be moved; their digests may not change
        identity |= {
            f"train.{key}": getattr(train, key) for key in ("seed", "batch_size", "text_learning_rate_ratio", "dtype")
        }
        identity |= {
            f"data.{key}": getattr(data, key)
            for key in ("source", "split", "image_first", "caption_drop", "max_caption_tokens")
        }
        return identity | {"number of samples": len(self.loader.source)}

    def _base_digest(self) -> str:
        """One digest of the text tower the run started from."""
        if not self.model.frozen_text:  # it has moved on since; the checkpoint holds it
            sha256 = {} if self.model.base is None else self.model.base.sha256
        elif self._is_text_the_bases:
            assert self.model.base is not None
            sha256 = self.model.base.sha256
        else:
            sha256 = digests(text_tensors(self.model))
        return hashlib.sha256(json.dumps(sha256, sort_keys=True).encode()).hexdigest()

    def _build_loader(self) -> BatchLoader:
        model, train = self.model, self.config.train
        if model.tokenizer is None:
            raise ValueError("the base LLM has no tokenizer to read captions with; put its tokenizer.json beside it")
        return BatchLoader(
            load_source(self.config.data, model.codec.config.image_size),
            self.config.data,
            codec=model.codec,
            tokenizer=model.tokenizer,
            tokens=SpecialTokens.of(model.tokenizer, model.boi_token_id),
            tokens_per_image=model.tokens_per_image,
            diffusion=model.diffusion.config,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            seed=train.seed,
            frozen_text=model.frozen_text,
            device=model.device,
        )


def build_model(config: ModelConfig, train: TrainConfig) -> LMFusion:
    """The model of a run on its device: frozen weights in `train.dtype`, trained ones in float32."""
    device = choose_device(train.device, "train.device")
    dtype = getattr(torch, train.dtype)
    if config.adapted is not None:
        model = LMFusion.from_pretrained(resolve_path(config.adapted))  # in the dtype it has: its image side is trained
        model.text.to(dtype)
    else:
        assert config.base is not None
        path = resolve_path(config.base)
        model = LMFusion.from_llm(path, config.image, config.codec, config.diffusion, dtype=dtype, seed=train.seed)
    model.freeze_text(train.text_learning_rate_ratio == 0)
    model.compute_dtype = dtype
    model.recompute = train.recompute
    model.image.float()
    if not model.frozen_text:
        model.text.float()
    return model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature


class Stop:
    """Whether the run was asked to stop."""

    is_set = False


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside, the first SIGTERM or SIGINT only sets the flag; a second one acts as it does elsewhere.

    Python gives signals to the main thread alone; in other threads the flag stays down.
    """
    stop = Stop()
    handlers: dict[int, Any] = {}
    is_main = threading.current_thread() is threading.main_thread()
    numbers: tuple[int, ...] = (signal.SIGTERM, signal.SIGINT) if is_main else ()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.is_set = True
        signal.signal(number, handlers[number])
        print("stopping after this step; once more to stop at once", file=sys.stderr)

    for number in numbers:
        handlers[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
