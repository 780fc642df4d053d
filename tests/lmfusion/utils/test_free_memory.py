"""Free memory on a CPU: the machine's, within the limits of the process's control groups."""

import pytest
import torch

from lmfusion.generation.memory import plan_memory
from lmfusion.utils import free_memory
from lmfusion.utils.free_memory import free_bytes
from tests.lmfusion.generation.models import build

GIB = 2**30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes the files of a system: its control groups by path, with limit, usage and what of it can be dropped."""

    def write(membership, version=2, available=8 * GIB, **groups):
        proc, root = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available // 1024} kB\n")
        if membership is not None:
            (proc / "self" / "cgroup").write_text(membership)
        limit_name, usage_name, prefix = (
            ("memory.max", "memory.current", "")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        )
        for path, (limit, usage, inactive) in groups.items():
            folder = root / ("" if version == 2 else "memory") / path.removeprefix("root").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit_name).write_text(f"{limit}\n")
            (folder / usage_name).write_text(f"{usage}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {inactive}\n")
        monkeypatch.setattr(free_memory, "PROC", proc)
        monkeypatch.setattr(free_memory, "CGROUPS", root)
        return free_bytes(torch.device("cpu"))

    return write


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        ("0::/\n", {"root": (4 * GIB, GIB, 0)}, 3 * GIB),  # a container sees its own group as the root
        ("0::/\n", {"root": (4 * GIB, 3 * GIB, 2 * GIB)}, 3 * GIB),
        ("0::/\n", {"root": ("max", GIB, 0)}, 8 * GIB),
        ("0::/\n", {}, 8 * GIB),
        (
            "0::/a/b\n",
            {"a": (5 * GIB, 2 * GIB, 0), "a/b": (4 * GIB, 0, 0)},
            3 * GIB,
        ),
        ("0::/a/b\n", {"a": ("max", 2 * GIB, 0), "a/b": (2 * GIB, GIB, 0)}, GIB),
        ("0::/a/b\n", {"a/b": ("max", 0, 0), "root": (2 * GIB, 0, 0)}, 2 * GIB),
        ("0::/../outside\n", {"root": (2 * GIB, 0, 0)}, 2 * GIB),
        ("0::/kubepods/pod1\n", {"root": (2 * GIB, 0, 0)}, 2 * GIB),  # not mounted here
        ("0::/\n", {"root": (2 * GIB, 3 * GIB, 0)}, 0),
        ("0::/\n", {"root": (99 * GIB, 0, 0)}, 8 * GIB),
        ("0::/\n", {"root": ("nonsense", 0, 0)}, 8 * GIB),
        (None, {"root": (GIB, 0, 0)}, 8 * GIB),
    ],
)
def test_version_2(system, membership, groups, expected):
    assert system(membership, **groups) == expected


@pytest.mark.parametrize(
    ("membership", "groups", "expected"),
    [
        ("5:cpu,cpuacct:/x\n4:memory:/docker/1\n", {"docker/1": (4 * GIB, 2 * GIB, GIB)}, 3 * GIB),
        ("4:memory:/docker/1\n0::/docker/1\n", {"root": (4 * GIB, 2 * GIB, 0)}, 2 * GIB),
        ("4:memory,hugetlb:/a/b\n", {"a": (3 * GIB, 0, 0), "a/b": (9223372036854771712, 0, 0)}, 3 * GIB),
        ("5:cpu:/a\n", {"a": (GIB, 0, 0)}, 8 * GIB),
    ],
)
def test_version_1(system, membership, groups, expected):
    assert system(membership, version=1, **groups) == expected


def test_the_cache_is_planned_within_the_limit(system, tiny_llama):
    model = build(tiny_llama)
    slot_bytes = plan_memory(model, 1, 1).slot_bytes
    system("0::/\n", root=(2000 * slot_bytes, 0, 0))
    assert plan_memory(model, None, 64).num_slots == 1000
