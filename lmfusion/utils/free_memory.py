"""Free memory of a GPU, or of the machine within the limits of this process's control groups."""

from pathlib import Path

import torch

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a GPU; on a CPU, what the machine has available within the limits of this process's
    control groups."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = (PROC / "meminfo").read_text().splitlines()
    names = ("MemAvailable:", "MemFree:")  # the first is missing from old kernels
    values = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(names)}
    available = next(values[name] for name in names if name in values)
    return max(0, min([available, *_left_in_groups()]))


def _left_in_groups() -> list[int]:
    """For each control group (version 1 or 2) that limits memory, the bytes that can still be allocated."""
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return []
    left = []
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            folders = _with_parents(CGROUPS, path)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            folders = _with_parents(CGROUPS / "memory", path)
        else:
            continue
        left += [number for folder in folders if (number := _left(folder, *names)) is not None]
    return left


def _with_parents(root: Path, path: str) -> list[Path]:
    """The group's folder and those above it, whose limits apply too. In a container the mounted root is the group
    itself: the path, which is the host's, does not exist there, and only the root is read."""
    folder = root / path.strip("/")
    return [folder, *folder.parents[: len(folder.relative_to(root).parts)]]


def _left(folder: Path, limit_name: str, usage_name: str, reclaimable_name: str) -> int | None:
    """None without a limit. Pages of files that nobody has used lately count as free: the kernel drops them first."""
    try:
        limit = (folder / limit_name).read_text().strip()
        if limit == "max":
            return None
        usage = int((folder / usage_name).read_text())
        return int(limit) - max(0, usage - _reclaimable(folder, reclaimable_name))
    except (OSError, ValueError):  # the root group has no limit, and groups from outside are not mounted
        return None


def _reclaimable(folder: Path, name: str) -> int:
    try:
        values = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(values[name])
    except (OSError, ValueError, KeyError):
        return 0
