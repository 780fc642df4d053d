"""The training loop, in one process or in several that torchrun starts; a run resumes from its folder."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import torch

from lmfusion.data.pipeline.loader import LoaderState, Step, check_shared_evenly
from lmfusion.data.pipeline.skip_log import SkipLog
from lmfusion.model.flops import batch_flops
from lmfusion.training.build import build_model, training_loader, validation_loader
from lmfusion.training.checkpoint import (
    CheckpointWriter,
    Parts,
    checkpoint_path,
    load_checkpoint,
    ranges,
    restore,
    slice_of,
)
from lmfusion.training.config import RunConfig
from lmfusion.training.distributed import World, compile_layers, parallelize
from lmfusion.training.ema import EMA
from lmfusion.training.export import save_model
from lmfusion.training.optimizer import Optimizer
from lmfusion.training.profiling import profiled
from lmfusion.training.run_date import with_date
from lmfusion.training.run_identity import check_identity, run_identity
from lmfusion.training.run_log import RunLog
from lmfusion.training.sampling import sample_grid
from lmfusion.training.session import run_session, saving_on
from lmfusion.training.step import (
    CollectiveError,
    NonFiniteError,
    Progress,
    Totals,
    Update,
    Updater,
    agreed_steps,
    fetch_metrics,
)
from lmfusion.training.validation import Validation
from lmfusion.utils.devices import choose_device
from lmfusion.utils.files import locked_if_exists
from lmfusion.utils.finite import NotFiniteError
from lmfusion.utils.json_lines import JsonLines
from lmfusion.utils.signals import Stop


class Trainer:
    """One training run. The same configuration continues the run that its output folder holds.

    world: the processes that train together; None: only this one. All ranks call the same methods. Raises ValueError
    or OSError for a configuration, data or files that cannot be used.
    """

    def __init__(self, config: RunConfig, world: World | None = None) -> None:
        self.world = world or World(0, 1, choose_device(config.train.device, "train.device"))
        config = with_date(config, self.world)
        self.config = config
        self.folder = Path(config.output)
        # These checks come before anything slow
        check_shared_evenly(config.sequences_per_step, self.world.size)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output must be a folder, got the file {self.folder}")
        self.model = build_model(config)
        self.loader = training_loader(config, self.model, self.world)
        self._identity = run_identity(config, self.model, self.loader.num_samples)
        parallelize(self.model, self.world, getattr(torch, config.train.dtype))
        if config.train.compile:
            compile_layers(self.model)
        self.weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        train = config.train
        self.optimizer = Optimizer(self.weights, train, train.optimizer, train.text_learning_rate_ratio)
        self.ema = EMA(self.weights, config.train.ema_decay)
        self.log = RunLog(config, self.world)
        self.skip_log = SkipLog(self._skip_log_path(self.world.rank), config.data.max_damaged)
        self.writer = CheckpointWriter(self.folder / "checkpoints", config.checkpoint.keep_last, self.world)
        self.progress = Progress()
        self._updater = Updater(self.model, self.weights, self.optimizer, self.ema, self.world)
        self._pending: list[Update] = []
        """Steps queued on the device whose numbers have not been fetched."""
        self._validation: Validation | None = None
        if config.validation.sources:
            make_loader = partial(validation_loader, config=config, model=self.model, world=self.world)
            self._validation = Validation(config, self.world, make_loader)
        with locked_if_exists(self.folder, self.world.rank):
            self._resume()

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self.progress.step

    def run(self, max_steps: int | None = None) -> bool:
        """Train up to `num_steps` updates in all, or up to `max_steps` if that is less, and export the model.

        Returns whether it got there; False means that SIGTERM or SIGINT stopped it. Either way there is a checkpoint.
        """
        train, sample = self.config.train, self.config.sample
        last = train.num_steps if max_steps is None else min(max_steps, train.num_steps)
        profile = profiled(train.profile, self.folder / "profile", self.world.rank)
        with self._session(last) as stop, profile as profiler:
            for step, totals in self._steps(last):
                profiler.before(self.step + 1)
                self._advance(step, totals)
                self.writer.poll()
                is_stopping = self.world.sum_integers([stop.is_set])[0] > 0  # a signal may reach only one rank
                if self._is_due(train.log_every):
                    self._fetch()
                    self.log.write_metrics(self.progress)
                if self._validation is not None and self._is_due(self.config.validation.every):
                    self._validate(self._validation)
                if sample.prompts and self._is_due(sample.every):
                    self._generate_samples()
                if is_stopping or self._is_due(self.config.checkpoint.every):
                    self.save_checkpoint()
                if is_stopping:
                    break
            self.save_checkpoint()
            self.writer.finish()
            if self.step < last:
                return False
            self.skip_log.check_any_good()
            self._export()
            return True

    def _steps(self, last: int) -> Iterator[tuple[Step, Totals]]:
        steps = self.loader.steps(self.progress.loader, max(0, last - self.step))
        flops = partial(batch_flops, self.model.config, frozen_text=self.model.frozen_text)
        return agreed_steps(self.log.waiting(steps), self.world, flops)

    def _advance(self, step: Step, totals: Totals) -> None:
        """Queue one step on the device. Nothing here waits for it."""
        before = self.progress
        try:
            self.skip_log.add(before.step + 1, step.num_samples, step.damaged, totals.num_damaged)
        except ValueError as error:  # too many over all ranks, so all raise it
            raise CollectiveError(str(error)) from error
        self._pending.append(self._updater.update(before, step, totals, self.config.train.batch_tokens))
        self.progress = Progress(
            step=before.step + 1,
            loader=step.state,
            epoch=step.epoch,
            num_samples=self.skip_log.num_samples,
            num_damaged=self.skip_log.num_damaged,
            num_cut=before.num_cut + step.num_cut,
        )
        self.log.advance()

    def _skip_log_path(self, rank: int | str) -> Path:
        return self.folder / (f"damaged.rank-{rank}.jsonl" if rank else "damaged.jsonl")

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0

    def _fetch(self) -> None:
        """Wait for the device and log the steps since the last time; rewind to before a step that is not finite."""
        updates, self._pending = self._pending, []
        steps, error = fetch_metrics(updates, self.model)
        self.log.gather(steps)
        if error is not None:
            self._rewind(updates[len(steps)].before)
            raise error

    def _rewind(self, progress: Progress) -> None:
        """Undo the counts and lines of steps after `progress`. The tensors already are as they were then."""
        self.progress = progress
        self.skip_log.resume(progress.step, {"num_samples": progress.num_samples, "num_damaged": progress.num_damaged})

    @contextmanager
    def _session(self, last: int) -> Iterator[Stop]:
        """Around the loop: holds the folder, and saves a checkpoint before an error that all ranks raise together."""
        with run_session(self.config, self.world, self._resume) as stop:
            if self.world.rank == 0:
                self._trim_skip_logs_of_former_ranks()
            self._rewind(self.progress)
            self._before_steps()
            self.model.train()
            try:
                with saving_on(CollectiveError, self._save_after_error):
                    self.log.open(self.step, last)
                    yield stop
            finally:
                self.log.close()
                self.skip_log.close()

    def _trim_skip_logs_of_former_ranks(self) -> None:
        """An earlier start may have had more ranks, whose logs no rank resumes now."""
        of_ranks = {self._skip_log_path(rank) for rank in range(self.world.size)}
        for path in set(self.folder.glob(self._skip_log_path("*").name)) - of_ranks:
            JsonLines(path).resume(self.step)

    def _save_after_error(self) -> None:
        with suppress(NonFiniteError):  # a step queued before the failing one may not be finite
            self._fetch()
        # The failing step may have been counted or logged in part
        self._rewind(self.progress)
        self.save_checkpoint()
        self.writer.finish()

    def _before_steps(self) -> None:
        """A hook for subclasses: runs before the first step, with the folder locked."""

    def _export(self) -> None:
        if self.world.rank == 0:
            save_model(self.config, checkpoint_path(self.writer.folder, self.step), self.folder / "model")
        self.world.barrier()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights and is in evaluation mode, and time does not count."""
        self._fetch()
        with self.log.stopwatch.paused(), self.ema.applied():
            self.model.eval()
            yield
            self.model.train()

    def _validate(self, validation: Validation) -> None:
        with self._averaged():
            self.log.write_validation(validation.evaluate(self.model, self.step))

    def _generate_samples(self) -> None:
        with self._averaged():
            try:
                grid = sample_grid(self.model, self.config.sample)
            except NotFiniteError as error:  # on all ranks: they generate the same images
                if self.world.rank == 0:
                    print(f"lmfusion: no samples at step {self.step}: {error}", file=sys.stderr)
            else:
                self.log.write_samples(self.step, grid)

    def save_checkpoint(self) -> None:
        """Begin to save what `Trainer` needs to continue from here; `writer` completes it."""
        self._fetch()
        with self.log.stopwatch.paused():
            state = {
                "run": self._identity,
                "progress": dataclasses.asdict(self.progress),
                "skipped": self.skip_log.state(),
                "log": self.log.state(),
            }
            self.writer.save(self.step, self._parts(), state)

    def _resume(self) -> None:
        path = self.writer.find()
        if path is None:
            return
        _, state = load_checkpoint(path, {})
        check_identity(self._identity, state["run"], path)
        parts, _ = load_checkpoint(path, ranges(self._parts()))
        restore(self.weights, parts["weights"])
        self.optimizer.load_state_tensors(parts["optimizer"])
        self.ema.load_state_tensors(parts["ema"])
        loader = LoaderState(**state["progress"].pop("loader"))
        self.progress = Progress(**state["progress"], loader=loader)
        self.log.load_state(state["log"])

    def _parts(self) -> Parts:
        return {
            "weights": {name: slice_of(weight) for name, weight in self.weights.items()},
            "optimizer": self.optimizer.state_tensors(),
            "ema": self.ema.state_tensors(),
        }
