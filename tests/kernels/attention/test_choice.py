"""The choice of the attention kernel: by request, by the measured table, by default; errors; and `backends()`.

Devices are simulated.
"""

import json

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels import reference
from lmfusion_kernels.attention import availability, dispatch, propose, table, torch_ops
from lmfusion_kernels.attention.table import TableRow
from lmfusion_kernels.runtime import device as device_module
from lmfusion_kernels.runtime import library
from lmfusion_kernels.runtime.backends import ATTENTION_KERNELS, BACKENDS, choose_backend, native_unsupported_reason
from lmfusion_kernels.runtime.device import runs_on

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LAYOUT = lk.TokenLayout.from_spans([[("text", 3), ("image", 4)]])


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("LMFUSION_KERNELS_BACKEND", raising=False)
    yield
    dispatch._cached_unavailable_reason.cache_clear()
    table.measured.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A device of capability 9.0 with Triton and PyTorch's FlashAttention, and no other package."""
    monkeypatch.setattr(library, "unavailable_reason", "")
    monkeypatch.setattr(device_module, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(availability, "installed_version", lambda distribution: None)
    monkeypatch.setattr(torch_ops, "has_module", lambda module: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    dispatch._cached_unavailable_reason.cache_clear()


def choose(backend=None, device=CUDA, dtype=torch.bfloat16, head_dim=128, needs_grad=True, layout=LAYOUT):
    return dispatch.choose_kernel(
        backend, layout, device=device, dtype=dtype, num_heads=4, num_kv_heads=2, head_dim=head_dim,
        needs_grad=needs_grad,
    )  # fmt: skip


needs_library = pytest.mark.skipif(not library.native, reason="the native ops were not compiled")


@needs_library
def test_on_the_cpu(monkeypatch):
    assert choose(device=CPU) == choose("native", device=CPU) == "native"
    assert choose(device=CPU, dtype=torch.float64) == "reference"
    assert choose("reference", device=CPU) == "reference"
    with pytest.raises(ValueError, match=r"no native attention .*native: it takes float32 and bfloat16, not float64"):
        choose("native", device=CPU, dtype=torch.float64)
    for name in ("flash", "triton", "flex"):
        with pytest.raises(
            ValueError, match=rf"{name} .* asked for, but it .*; backend='native' runs native attention"
        ):
            choose(name, device=CPU)
    with pytest.raises(ValueError, match=r"flash attention was asked for, but .*; backend='reference' runs everywhere"):
        choose("flash", device=CPU, dtype=torch.float64)
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "flash")
    with pytest.raises(ValueError, match="flash attention was asked for by LMFUSION_KERNELS_BACKEND, but"):
        choose(device=CPU)
    monkeypatch.delenv("LMFUSION_KERNELS_BACKEND")
    monkeypatch.setattr(library, "unavailable_reason", "the native ops were not built: no compiler")
    dispatch._cached_unavailable_reason.cache_clear()
    assert choose(device=CPU) == "reference"


@pytest.mark.usefixtures("hopper")
def test_default_order_on_cuda():
    assert choose() == choose("native") == "triton"
    assert choose("flash") == "flash"
    assert choose(dtype=torch.float32) == "triton"
    assert choose(head_dim=76) == "reference"
    with pytest.raises(
        ValueError, match=r"flash .* takes bfloat16 .* not float32; backend='native' runs triton attent"
    ):
        choose("flash", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"triton: it takes head sizes .* not 76; flash: it takes bfloat16"):
        choose("native", head_dim=76, dtype=torch.float32)


@pytest.mark.usefixtures("hopper")
def test_triton_that_is_absent_gives_way(monkeypatch):
    monkeypatch.setattr(torch_ops, "has_module", lambda module: False)
    assert choose() == "flash"
    with pytest.raises(ValueError, match="triton is not installed; `pip install triton`"):
        choose("triton")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    dispatch._cached_unavailable_reason.cache_clear()
    assert choose() == "reference"


@pytest.mark.usefixtures("hopper")
def test_the_environment(monkeypatch):
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "flash")
    assert choose() == "flash"
    assert choose("triton") == "triton"  # the argument is nearer
    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "flash-attn-5")
    with pytest.raises(ValueError, match="LMFUSION_KERNELS_BACKEND='flash-attn-5' is unknown; known: native"):
        choose()


@pytest.mark.usefixtures("hopper")
def test_measured_rows_come_first(monkeypatch):
    rows = (
        TableRow("9.0", "bfloat16", 128, "training", 0, "flash"),
        TableRow("9.0", "bfloat16", 128, "training", 7, "flex"),
        TableRow("9.0", "bfloat16", 64, "forward", 0, "flash-attn-3"),
        TableRow("8.0", "bfloat16", 256, "forward", 0, "flash"),
    )
    monkeypatch.setattr(table, "load", lambda: rows)
    table.measured.cache_clear()
    small = lk.TokenLayout.from_spans([[("text", 6)]])
    assert choose(layout=small) == "flash"
    assert choose() == "flex"  # from 7 tokens on
    assert choose(needs_grad=False) == "triton"  # not measured
    assert choose(head_dim=64, needs_grad=False) == "triton"  # measured, and not installed here
    assert choose(head_dim=256, needs_grad=False) == "triton"  # measured on another device


def test_row_ops_take_the_name_of_an_attention_kernel(monkeypatch):
    """The name means the native row ops with that attention."""
    monkeypatch.setattr(library, "native", True)
    x = torch.ones(2)
    for name in ATTENTION_KERNELS:
        assert choose_backend(name, x) == "native"
    with pytest.raises(ValueError, match="native backend was asked for, but it takes float32 and bfloat16 on cpu"):
        choose_backend("flash", x.double())


def test_names_are_those_of_the_kernels():
    assert set(dispatch.KERNELS) == set(BACKENDS)
    assert all(kernel.summary for kernel in dispatch.KERNELS.values())


@pytest.mark.usefixtures("hopper")
def test_backends_explains(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here = lk.backends()
    assert here["triton"].available and here["triton"].chosen_for == ("cuda",)
    assert here["triton"].detail.endswith("chosen by default, not measured")
    assert here["flash"].available and here["flash"].chosen_for == ()
    assert "not installed; `pip install flash-attn" in here["flash-attn-2"].detail

    rows = (TableRow("9.0", "bfloat16", 128, "training", 0, "flash"),)
    monkeypatch.setattr(table, "load", lambda: rows)
    table.measured.cache_clear()
    assert lk.backends()["flash"].detail.endswith("chosen measured: bfloat16 heads of 128 with gradients")
    assert "bfloat16 heads of 128 with" not in lk.backends()["triton"].detail

    monkeypatch.setenv("LMFUSION_KERNELS_BACKEND", "flash")
    assert lk.backends()["flash"].detail.endswith("chosen because it was asked for")
    assert lk.backends()["triton"].chosen_for == ()
    assert lk.backends().note.startswith(
        "LMFUSION_KERNELS_BACKEND=flash asks for flash attention, which cannot be had on"
    )


def test_the_file_holds_rows_that_fit():
    """The committed file can be read, and names kernels that exist."""
    assert all(row.kernel in dispatch.KERNELS and row.direction in table.DIRECTIONS for row in table.load())


def result(kernel, direction, median_ms, num_tokens=1024, pattern="causal", **more):
    base = {"capability": [9, 0], "dtype": "bfloat16", "head_dim": 128, "num_tokens": num_tokens, "pattern": pattern}
    return base | {"kernel": kernel, "direction": direction, "median_ms": median_ms, "spread": 0.1} | more


def test_propose():
    results = [
        result("triton", "forward", 1.0), result("triton", "backward", 5.0),
        result("flash", "forward", 2.0), result("flash", "backward", 2.0),
        result("flash-attn-3", "forward", 0.5, pattern="causal"),  # not on the other pattern: does not compete
        *(result(kernel, direction, 1.0, pattern="packed")
          for kernel in ("triton", "flash") for direction in ("forward", "backward")),
    ]  # fmt: skip
    assert propose.propose(results) == [
        TableRow("9.0", "bfloat16", 128, "forward", 0, "triton"),
        TableRow("9.0", "bfloat16", 128, "training", 0, "flash"),
    ]


def test_propose_by_size():
    """A row for each size at which the fastest kernel changes, and none for a difference that is noise."""
    times = {512: (1.0, 2.0), 1024: (2.0, 1.99), 4096: (5.0, 4.0), 8192: (9.0, 7.0)}
    results = [
        result(kernel, "forward", time, num_tokens)
        for num_tokens, pair in times.items()
        for kernel, time in zip(("triton", "flash"), pair, strict=True)
    ]
    assert [(row.min_tokens, row.kernel) for row in propose.propose(results)] == [(0, "triton"), (4096, "flash")]
    with pytest.raises(ValueError, match="must be forward or backward, got 'both'"):
        propose.propose([result("triton", "both", 1.0)])
    assert propose.propose([]) == []


def test_a_proposal_becomes_the_file():
    old = (
        TableRow("8.0", "float16", 64, "forward", 0, "flash"),
        TableRow("9.0", "bfloat16", 128, "forward", 0, "flex"),
    )
    new = propose.propose([result("triton", "forward", 1.0)])
    assert table.parse(propose.merge(old, new)) == (old[0], *new)  # the rows of the measured device are replaced
    assert propose.merge([], []) == "[]\n"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kernel": "flash"}, "must have the fields of TableRow"),
        ({"direction": "sideways"}, "must be one of forward, training, got 'sideways'"),
    ],
)
def test_a_row_that_does_not_fit(entry, message):
    whole = dict(capability="9.0", dtype="bfloat16", head_dim=64, direction="forward", min_tokens=0, kernel="flash")
    text = json.dumps([entry if len(entry) == 1 and "kernel" in entry else whole | entry])
    with pytest.raises(ValueError, match=message):
        table.parse(text)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (("80-real", "90a-real", "90-virtual"), (8, 0), True),
        (("80-real", "90a-real", "90-virtual"), (8, 9), True),  # machine code of the same major version
        (("80-real", "90a-real", "90-virtual"), (9, 0), True),
        (("80-real", "90a-real", "90-virtual"), (12, 0), True),  # PTX
        (("80-real", "90a-real", "90-virtual"), (7, 5), False),
        (("80-real", "90a-real"), (10, 0), False),
        (("90a-real",), (9, 3), False),  # the letter binds to one version
        (("80",), (9, 0), True),  # both machine code and PTX
        (("100-real",), (10, 3), True),
        (("100a-real",), (10, 0), True),
    ],
)
def test_which_devices_compiled_code_runs_on(architectures, capability, expected):
    assert runs_on(architectures, capability) is expected


class OnCuda:
    """The attributes of a tensor that `native_unsupported_reason` reads."""

    device, dtype = CUDA, torch.float16

    def is_floating_point(self):
        return True


def test_a_device_without_compiled_code(monkeypatch):
    monkeypatch.setattr(library, "native", True)
    monkeypatch.setattr(library, "build_info", {"cuda_architectures": ["80-real"]})
    monkeypatch.setattr(device_module, "_capability", lambda device: (8, 6))
    assert native_unsupported_reason(OnCuda()) == ""  # float16 too
    monkeypatch.setattr(device_module, "_capability", lambda device: (7, 5))
    reason = native_unsupported_reason(OnCuda())
    assert "compute capability 7.5" in reason and "LMFUSION_CUDA_ARCHITECTURES=75" in reason


def test_second_derivatives_are_refused(monkeypatch):
    """Also by the attention kernels that autograd cannot follow."""
    from lmfusion_kernels.attention.two_pass import TwoPass
    from tests.kernels.attention.packed_causal import PlainPackedCausal

    monkeypatch.setitem(dispatch.KERNELS, "flash", TwoPass(PlainPackedCausal()))
    dispatch._cached_unavailable_reason.cache_clear()
    q, k, v = (torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = lk.hybrid_attention(q, k, v, LAYOUT, backend="flash")
    expected = reference.hybrid_attention(q, k, v, LAYOUT)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (q, k, v), dout, create_graph=True)
    for grad, target in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(grad, target)
    with pytest.raises(RuntimeError, match="flash attention has no second derivative"):
        grads[0].sum().backward()
