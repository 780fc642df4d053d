"""Trains one model in several processes: the world that torchrun started, and FSDP2 with one group per layer.

Each layer of the text tower forms one FSDP2 group with the same layer of the image tower; the root group has all other
weights. A group's weights, frozen ones too, are divided by rows (dimension 0) among the ranks. For the group's forward,
and again for its backward, every rank gathers them in one collective, while the previous group computes, and frees them
afterwards:

- layers are gathered in the dtype of the activations, and trained ones are cast from float32 first, so that bfloat16
  moves half of the bytes and no copy of a weight is kept for the backward;
- the root's weights are gathered as they are: the patch coder computes in float32 whatever dtype the activations have;
- gradients are averaged in float32, in one collective per group, and accumulated sharded, micro-batch by micro-batch;
- frozen weights are only gathered: they have no gradients to compute, send or keep;
- every rank holds the whole codec and vision encoder, which threads of the loader use.

FSDP's own prefetch order is kept (set_modules_to_forward_prefetch would only start it earlier).
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import lmfusion_kernels as lk
from lmfusion.model.losses import LMFusionOutput
from lmfusion.model.modeling import LMFusion
from lmfusion.model.towers import TextLayer
from lmfusion.utils.devices import choose_device
from lmfusion_kernels.block.weights import TowerRows

P = ParamSpec("P")
T = TypeVar("T")

CONTROL_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for each other on the CPU: one of them may be writing the exported model at that time."""


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them. All must call its methods in the same order."""

    rank: int
    size: int
    device: torch.device
    """Of this process"""
    control: dist.ProcessGroup | None = None
    """A gloo group over all ranks, with which they agree between steps without waiting for the device; None if alone"""

    def sum_integers(self, values: Sequence[int]) -> list[int]:
        """Each value summed over the ranks (int64), on the CPU and without waiting for the device."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(list(values), dtype=torch.int64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def sum_tensor(self, x: Tensor) -> Tensor:
        """`x`, on the training device, summed over the ranks in place, without waiting for the device."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Wait, on the CPU, until all ranks have called this."""
        self.sum_integers([0])


@contextmanager
def init_distributed(device: str) -> Iterator[World]:
    """The world that torchrun describes in the environment, or this process alone without torchrun.

    device: "auto", "cpu" or "cuda"; each process takes the GPU with the number LOCAL_RANK of its machine. Raises
    ValueError for an incomplete environment, and for more processes on a machine than it has GPUs.
    """
    size = _from_environment("WORLD_SIZE", 1)
    chosen = choose_device(device, "train.device")
    if size == 1:
        yield World(0, 1, chosen)
        return
    rank, local_rank = _from_environment("RANK"), _from_environment("LOCAL_RANK")
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"each process must have a GPU of its own, got {torch.cuda.device_count()} GPUs for process "
                f"{local_rank} of this machine; start as many processes as there are GPUs (torchrun --nproc-per-node)"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield World(rank, size, chosen, dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except BaseException as error:
        # If only this rank fails, others may be in the middle of a collective, and destroying an NCCL group would wait
        # for them. So on GPUs it is destroyed only for ValueErrors, which all ranks raise together.
        if chosen.type == "cpu" or isinstance(error, ValueError):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}; start several processes with torchrun")
    return int(text)


def local_shard(weight: Tensor) -> Tensor:
    """The rows of `weight` that this rank holds, perhaps none; the tensor itself if it is not sharded."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def local_range(weight: Tensor) -> tuple[int, int, int]:
    """(first, end, size): this rank holds the rows [first, end) of the `size` rows of `weight` (its dimension 0).

    All of them, (0, size, size), if it is not sharded; a tensor without dimensions counts as one row.
    """
    size = weight.shape[0] if weight.dim() else 1
    if not isinstance(weight, DTensor):
        return 0, size, size
    rank, num_ranks = weight.device_mesh.get_local_rank(), weight.device_mesh.size()
    length = -(-size // num_ranks)  # as torch.chunk divides: the last ranks may get fewer, or none
    first, end = min(rank * length, size), min((rank + 1) * length, size)
    assert local_shard(weight).shape[0] == end - first
    return first, end, size


def parallelize(model: LMFusion, world: World, dtype: torch.dtype) -> None:
    """Move a model from the CPU to the training device, trained weights in float32 and frozen ones in `dtype`.

    Activations are then computed in `dtype`. With several ranks, which must all have the same model, FSDP2 divides its
    weights among them: parameters become DTensors, whose local rows `local_shard` and `local_range` give. Gradients are
    then averages over the ranks, so multiply a loss by `world.size` if its gradients must add up. All ranks must call
    the model, and its draw, generate and caption, together.

    This works layer by layer, so the device never holds more than one layer beyond what it keeps. Freeze or unfreeze
    the text tower before.
    """
    model.compute_dtype = dtype
    mesh = None if world.size == 1 else init_device_mesh(world.device.type, (world.size,))
    for modules in _groups(model):
        _move(modules, world.device, dtype)
        if mesh is not None:
            _shard(modules, model, dtype, mesh)
    for part in (model.codec, model.vision):
        if part is not None:
            part.to(world.device)


def _groups(model: LMFusion) -> Iterator[list[nn.Module]]:
    """The modules whose weights are gathered together: those of each layer, then the model for everything else."""
    for i, layer in enumerate(model.text.layers):
        yield [layer, model.image.layers[i]] if len(model.image.layers) else [layer]
    yield [model]


def _move(modules: list[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    for module in modules:
        for name, parameter in module.named_parameters():
            # DTensors were sharded with their layer; the codec keeps its own dtype
            if isinstance(parameter, DTensor) or name.startswith("codec."):
                continue
            on_device = parameter.data.to(device)  # before the cast, which may double its size
            parameter.data = on_device.to(torch.float32 if parameter.requires_grad else dtype)


def _shard(modules: list[nn.Module], model: LMFusion, dtype: torch.dtype, mesh: DeviceMesh) -> None:
    is_root = modules[0] is model
    policy = MixedPrecisionPolicy(
        param_dtype=None if is_root else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    group = modules[0] if len(modules) == 1 else modules
    whole = {*model.codec.parameters(), *(() if model.vision is None else model.vision.parameters())}
    fully_shard(group, mesh=mesh, mp_policy=policy, ignored_params=whole)
    if is_root:
        model.register_forward_hook(_reshard_after_forward_without_backward)
        for name in ("draw", "generate", "caption"):
            register_fsdp_forward_method(model, name)
            setattr(model, name, _resharding(model, getattr(model, name)))


def _reshard_after_forward_without_backward(model: nn.Module, args: Any, output: LMFusionOutput) -> None:
    """Free the root's gathered weights after a forward without gradients.

    FSDP keeps them for the backward. If there is none, it would use the old ones again after the next update.
    """
    if not any(isinstance(value, Tensor) and value.requires_grad for value in output.values()):
        _reshard(model)


def _resharding(model: nn.Module, method: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        finally:
            _reshard(model)

    return call


def _reshard(model: nn.Module) -> None:
    assert isinstance(model, FSDPModule)
    model.reshard()


def compile_layers(model: LMFusion) -> None:
    """Compile what a layer computes, with torch.compile: one function for all layers and all numbers of tokens.

    Gathering a layer's weights stays outside. The first steps wait for the compiler a few times. Layers are not
    compiled without gradients, nor for the rare batches in which a class of tokens has one member or none, since the
    compiler would make a version for each of these.
    """
    compiled = torch.compile(lk.routed_block)

    @functools.wraps(lk.routed_block)
    def block(rows: TowerRows, layout: lk.TokenLayout, *args: Any, **options: Any) -> TowerRows:
        is_usual = min(layout.num_live, layout.num_image) > 1 and layout.num_constant != 1
        compute = compiled if is_usual and torch.is_grad_enabled() else lk.routed_block
        return compute(rows, layout, *args, **options)

    for layer in model.text.layers:
        assert isinstance(layer, TextLayer)
        layer.block = block
