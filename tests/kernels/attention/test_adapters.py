"""The optional packages are called with the arguments that they take; stand-ins with their schemas run on the CPU.

The schemas are those of flash-attn 2.8, of hopper/flash_attn_interface.py of 2026 and of flash-attn-4 4.0.0b36. A wrong
name, order or default fails here; the results are compared with the specification.
"""

import importlib.machinery
import sys
import types

import pytest
import torch

import lmfusion_kernels as lk
from lmfusion_kernels.attention import availability, dispatch, flash, flash_attn_3, flash_attn_4
from lmfusion_kernels.attention.interface import AttentionCall, AttentionProblem
from lmfusion_kernels.attention.packed_causal import Sequences, at_least_two
from lmfusion_kernels.attention.reference import Reference, dense_attention
from lmfusion_kernels.runtime import device as device_module
from tests.kernels.attention.packed_causal import PlainPackedCausal
from tests.kernels.attention.test_two_pass import make_inputs

DOCUMENTS = [[("text", 5), ("image", 7), ("text", 3)], [("image", 4), ("text", 2)], [("text", 6)]]
HOPPER = torch.device("cuda", 0)

FLASH_ATTN_2 = {
    "_flash_attn_varlen_forward": "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt "
    "max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left=-1, "
    "SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? "
    "block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    "_flash_attn_varlen_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt "
    "window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, bool "
    "zero_tensors=False) -> Tensor",
}
FLASH_ATTN_3 = {
    "_flash_attn_forward": "(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? qv=None, "
    "Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? "
    "seqused_q=None, Tensor? seqused_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? "
    "page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? "
    "rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? "
    "v_descale=None, float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, SymInt "
    "window_size_right=-1, SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, Tensor? "
    "scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, SymInt sm_margin=0) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    "_flash_attn_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor? "
    "cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? sequed_q=None, Tensor? sequed_k=None, SymInt? "
    "max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor(a12!)? dq=None, Tensor(a13!)? dk=None, Tensor(a14!)? "
    "dv=None, float? softmax_scale=None, bool is_causal=False, SymInt window_size_left=-1, SymInt "
    "window_size_right=-1, float softcap=0.0, bool deterministic=False, SymInt sm_margin=0) -> Tensor",
}


@pytest.fixture(autouse=True)
def forget_answers():
    yield
    dispatch._cached_unavailable_reason.cache_clear()
    flash_attn_3._build_flags.cache_clear()


@pytest.fixture
def define_ops():
    """Ops of a package under its own namespace, implemented on the CPU and removed after the test."""
    libraries = []

    def define(namespace, schemas, implementations):
        library = torch.library.Library(namespace, "FRAGMENT")
        libraries.append(library)
        for name, schema in schemas.items():
            library.define(name + schema)
            library.impl(name, implementations[name], "CPU")

    yield define
    for library in libraries:
        library._destroy()


def pretend(monkeypatch, versions, modules, capability=(9, 0)):
    """Simulate these installed packages and a device of this capability."""
    for name, module in modules.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(availability, "version", lambda name: versions[name])
    monkeypatch.setattr(device_module, "_capability", lambda device: capability)


def sequences_of(a):
    bounds = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return Sequences(*(a[name] for name in bounds), a.get("seqused_k"))


def by_name(schema, arguments):
    """Arguments as a CPU implementation receives them, under the names of the schema, defaults filled in."""
    parsed = torch._C.parse_schema("op" + schema)
    return dict(zip((argument.name for argument in parsed.arguments), arguments, strict=True))


def implementations(schemas, forward_name, backward_name, causal_name):
    """The ops by the plain kernel; every argument that is not passed on must have its harmless value."""
    plain = PlainPackedCausal()
    harmless = (None, -1, 0, 0.0, False)

    def check(arguments, used):
        assert arguments[causal_name if "dout" in arguments else "causal"] is True
        used = {*used, "softmax_scale", "causal", "is_causal", "seqused_k", "rotary_interleaved", "num_splits"}
        assert all(value in harmless for name, value in arguments.items() if name not in used)

    def forward(*arguments, **more):
        a = by_name(schemas[forward_name], complete(schemas[forward_name], arguments, more))
        names = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
        check(a, names)
        assert a.get("num_splits", 1) == 1
        out, lse = plain.forward(a["q"], a["k"], a["v"], sequences_of(a), a["softmax_scale"])
        return out, lse, out.new_empty(0), out.new_empty(0)

    def backward(*arguments, **more):
        a = by_name(schemas[backward_name], complete(schemas[backward_name], arguments, more))
        names = {"dout", "q", "k", "v", "out", "softmax_lse", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"}
        check(a, {*names, "max_seqlen_k", "dq", "dk", "dv", "deterministic"})
        assert a["deterministic"] is availability.wants_deterministic()
        tensors = (a[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        grads = plain.backward(*tensors, sequences_of(a), a["softmax_scale"])
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            assert a[name].is_contiguous()
            a[name].copy_(grad)
        return a["softmax_lse"].clone()

    return {forward_name: forward, backward_name: backward}


def complete(schema, arguments, more):
    parsed = torch._C.parse_schema("op" + schema).arguments
    return [
        *arguments,
        *(more.get(a.name, a.default_value if a.has_default_value() else None) for a in parsed[len(arguments) :]),
    ]


def assert_equals_the_specification(name, tolerance=1e-12, documents=DOCUMENTS):
    kernel, specification = dispatch.KERNELS[name], Reference()
    layouts = [lk.TokenLayout.from_spans(documents)]
    if not kernel.unsupported_reason(case(needs_grad=False, is_cached=True)):
        for cache_starts in ([0, 20, 40], [7, 29, 64]):
            cache = {"cached_lengths": [3, 0, 9], "cache_starts": cache_starts, "cache_slots": 90}
            layouts.append(lk.TokenLayout.from_spans(documents, **cache))
    for layout in layouts:
        for rows in ("all", "active") if layout.is_cached else ("all", "active", "constant"):
            q, k, v, dout = make_inputs(layout, rows)
            out, lse = kernel.forward(AttentionCall(q, k, v, layout, rows, 0.3))
            expected = specification.forward(AttentionCall(q, k, v, layout, rows, 0.3))
            assert (out - expected[0]).abs().max() <= tolerance and (lse - expected[1]).abs().max() <= tolerance
            if rows == "constant" or layout.is_cached:
                continue
            grads = kernel.backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, out, lse)
            for grad, target in zip(
                grads, specification.backward(AttentionCall(q, k, v, layout, rows, 0.3), dout, out, lse), strict=True
            ):
                assert (grad - target).abs().max() <= tolerance


def flash_attn_2(define_ops):
    define_ops(
        "flash_attn",
        FLASH_ATTN_2,
        implementations(FLASH_ATTN_2, "_flash_attn_varlen_forward", "_flash_attn_varlen_backward", "causal"),
    )
    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
    interface._wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
    package.flash_attn_interface = interface
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


def flash_attn_3_modules(define_ops, **flags):
    define_ops(
        "flash_attn_3",
        FLASH_ATTN_3,
        implementations(FLASH_ATTN_3, "_flash_attn_forward", "_flash_attn_backward", "is_causal"),
    )
    interface, config = types.ModuleType("flash_attn_interface"), types.ModuleType("flash_attn_config")
    interface._flash_attn_forward = torch.ops.flash_attn_3._flash_attn_forward
    interface._flash_attn_backward = torch.ops.flash_attn_3._flash_attn_backward
    config.CONFIG = {"build_flags": flags}
    return {
        "flash_attn_interface": interface,
        "flash_attn_3": types.ModuleType("flash_attn_3"),
        "flash_attn_config": config,
    }


def case(needs_grad=True, head_dim=128, dtype=torch.bfloat16, is_cached=False):
    return AttentionProblem(HOPPER, dtype, 32, 8, head_dim, needs_grad, is_cached)


def test_deterministic_backwards_where_torch_demands_them(monkeypatch, define_ops):
    pretend(monkeypatch, {"flash-attn": "2.8.3"}, flash_attn_2(define_ops) | flash_attn_3_modules(define_ops))
    assert not availability.wants_deterministic()  # this suite asks for warnings alone
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: False)
    assert availability.wants_deterministic()
    assert_equals_the_specification("flash-attn-2")  # the stand-ins compare the argument
    assert_equals_the_specification("flash-attn-3")


def test_flash_attn_2(monkeypatch, define_ops):
    pretend(monkeypatch, {"flash-attn": "2.8.3"}, flash_attn_2(define_ops))
    assert dispatch.unsupported_reason("flash-attn-2", case()) == ""
    assert_equals_the_specification("flash-attn-2")
    assert "multiples of 8 up to 256, not 100" in dispatch.unsupported_reason("flash-attn-2", case(head_dim=100))
    assert "not float32" in dispatch.unsupported_reason("flash-attn-2", case(dtype=torch.float32))


@pytest.mark.parametrize("version", ["2.6.3", "3.0.0"])
def test_flash_attn_of_another_version(monkeypatch, define_ops, version):
    pretend(monkeypatch, {"flash-attn": version}, flash_attn_2(define_ops))
    reason = dispatch.unsupported_reason("flash-attn-2", case())
    assert version in reason and "from 2.7 on" in reason


def test_flash_attn_2_that_does_not_import(monkeypatch):
    pretend(monkeypatch, {"flash-attn": "2.8.3"}, {"flash_attn": types.ModuleType("flash_attn")})
    assert "`import flash_attn.flash_attn_interface` fails" in dispatch.unsupported_reason("flash-attn-2", case())


def test_flash_attn_3(monkeypatch, define_ops):
    pretend(monkeypatch, {}, flash_attn_3_modules(define_ops))
    assert dispatch.unsupported_reason("flash-attn-3", case()) == ""
    assert_equals_the_specification("flash-attn-3")


def test_flash_attn_3_without_a_backward(monkeypatch, define_ops):
    """tokenspeed-fa3 is built like this, and without heads of 96, which then use the kernels of 128."""
    flags = {f"FLASHATTENTION_DISABLE_{name}": True for name in ("BACKWARD", "HDIM96", "HDIM192", "HDIM256")}
    pretend(monkeypatch, {}, flash_attn_3_modules(define_ops, **flags))
    assert "built without a backward" in dispatch.unsupported_reason("flash-attn-3", case())
    assert dispatch.unsupported_reason("flash-attn-3", case(needs_grad=False, head_dim=96)) == ""
    assert "head sizes up to 128, not 192" in dispatch.unsupported_reason(
        "flash-attn-3", case(needs_grad=False, head_dim=192)
    )


def test_flash_attn_3_elsewhere(monkeypatch, define_ops):
    pretend(monkeypatch, {}, flash_attn_3_modules(define_ops), capability=(8, 0))
    assert (
        dispatch.unsupported_reason("flash-attn-3", case())
        == "it needs compute capability 9.0, and this device has 8.0"
    )


def test_torch_flash_by_schema(monkeypatch):
    """The ops of the installed torch take what is passed, and a torch whose ops differ is refused by name."""
    assert flash.schema_difference() == ""
    monkeypatch.setattr(flash, "FORWARD_ARGUMENTS", (*flash.FORWARD_ARGUMENTS, "softcap"))
    assert "has other arguments (softcap)" in flash.schema_difference()
    monkeypatch.setattr(flash, "FORWARD_ARGUMENTS", flash.FORWARD_ARGUMENTS[:8])
    assert "has other arguments (is_causal, return_debug_mask)" in flash.schema_difference()


def test_torch_flash_on_the_device(monkeypatch):
    pretend(monkeypatch, {}, {})
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert dispatch.unsupported_reason("flash", case()) == ""
    assert dispatch.unsupported_reason("flash", case(head_dim=256)) == ""
    assert "not 264" in dispatch.unsupported_reason("flash", case(head_dim=264))
    monkeypatch.setattr(device_module, "_capability", lambda device: (8, 9))
    assert "backward takes head sizes up to 192" in dispatch.unsupported_reason("flash", case(head_dim=256))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    dispatch._cached_unavailable_reason.cache_clear()
    assert dispatch.unsupported_reason("flash", case()) == "this build of torch has no FlashAttention"


def test_torch_flash_calls_the_ops(monkeypatch):
    """The two aten ops by the plain kernel: order and defaults as torch's schema has them."""
    schemas = {
        name: str(getattr(torch.ops.aten, name).default._schema)
        for name in ("_flash_attention_forward", "_flash_attention_backward")
    }
    plain = PlainPackedCausal()

    def call(name):
        def op(*arguments, **more):
            schema = schemas[name][schemas[name].index("(") :]
            a = by_name(schema, complete(schema, arguments, more))
            packed = [a[key] for key in ("query", "key", "value")]
            bounds = [a[key] for key in ("cum_seq_q", "cum_seq_k", "max_q", "max_k")]
            assert a["is_causal"] is True and a["dropout_p"] == 0.0
            if name == "_flash_attention_forward":
                assert a["return_debug_mask"] is False
                return *plain.forward(*packed, Sequences(*bounds, a["seqused_k"]), a["scale"]), None, None, None
            return plain.backward(a["grad_out"], *packed, a["out"], a["logsumexp"], Sequences(*bounds), a["scale"])

        return op

    stand_in = types.SimpleNamespace(**{name: call(name) for name in schemas})
    monkeypatch.setattr(flash.torch.ops, "aten", stand_in)
    assert_equals_the_specification("flash")


def test_sequences_with_no_query_beside_sequences_with_one():
    """FlashAttention-2 assumes from a bound of one query that every sequence has exactly one."""
    q = torch.empty(2, 4, 8)

    def bound(max_queries, query_start):
        start = torch.tensor(query_start)
        return at_least_two(Sequences(start, start, max_queries, 9), q)

    assert bound(1, [0, 1, 2]) == 1
    assert bound(1, [0, 1, 1, 2]) == 2
    assert bound(5, [0, 2]) == 5


def ranges_to_mask(start, end, num_columns):
    column = torch.arange(num_columns)
    return (column >= start[:, None]) & (column < end[:, None])


def assert_listed(lists, mask):
    """Every visible pair lies in a listed block, and full blocks are visible as a whole."""
    rows, columns = (-(-size // 128) for size in mask.shape)
    assert lists.mask_block_idx.shape == lists.full_block_idx.shape == (1, 1, rows, columns)
    for i in range(rows):
        full = lists.full_block_idx[0, 0, i, : lists.full_block_cnt[0, 0, i]].tolist()
        partial = lists.mask_block_idx[0, 0, i, : lists.mask_block_cnt[0, 0, i]].tolist()
        for j in range(columns):
            block = mask[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            assert block.all() if j in full else j in partial or not block.any()


def flash_attn_4_modules(calls):
    """flash_attn.cute as far as it is used: keyword arguments of 4.0.0b36, one batch, block lists of its own type."""
    names = ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn.cute.block_sparsity")
    modules = {name: types.ModuleType(name) for name in names}

    def block_sparse_tensors_torch(mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx, *, block_size):
        return types.SimpleNamespace(**locals())

    def forward(q, k, v, *, softmax_scale, causal, pack_gqa, mask_mod, aux_tensors, block_sparse_tensors, return_lse):
        assert causal is False and return_lse is True and pack_gqa is False and mask_mod == "the mask"
        calls.append(block_sparse_tensors)
        assert_listed(block_sparse_tensors, ranges_to_mask(*aux_tensors, k.shape[1]))
        out, lse = dense_attention(q[0], k[0], v[0], *aux_tensors, softmax_scale)
        return out[None], lse[None], None, None, None

    def backward(q, k, v, out, dout, lse, *, softmax_scale, causal, mask_mod, aux_tensors, block_sparse_tensors):
        assert causal is False and mask_mod == "the mask" and lse.shape == (1, q.shape[2], q.shape[1])
        calls.append(block_sparse_tensors)
        assert_listed(block_sparse_tensors, ranges_to_mask(*aux_tensors, k.shape[1]).t())
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again, _ = dense_attention(*(x[0] for x in leaves), *aux_tensors, softmax_scale)
        assert torch.allclose(again, out[0])
        return torch.autograd.grad(again, leaves, dout[0])

    modules["flash_attn.cute.block_sparsity"].BlockSparseTensorsTorch = block_sparse_tensors_torch
    modules["flash_attn.cute.interface"]._flash_attn_fwd = forward
    modules["flash_attn.cute.interface"]._flash_attn_bwd = backward
    return modules


def test_flash_attn_4(monkeypatch):
    calls = []
    pretend(monkeypatch, {"flash-attn-4": "4.0.0b36"}, flash_attn_4_modules(calls))
    monkeypatch.setattr(flash_attn_4, "_mask", lambda: "the mask")
    stand_in = types.SimpleNamespace(flash_attn_4=flash_attn_4._forward, flash_attn_4_backward=flash_attn_4._backward)
    monkeypatch.setattr(flash_attn_4, "_ops", stand_in)
    assert dispatch.unsupported_reason("flash-attn-4", case()) == ""
    assert_equals_the_specification("flash-attn-4")
    long = [[("text", 150), ("image", 90), ("text", 30)], [("text", 20), ("image", 140), ("text", 200)]]
    assert_equals_the_specification("flash-attn-4", documents=long)
    assert (
        dispatch.unsupported_reason("flash-attn-4", case(needs_grad=False, is_cached=True))
        == "it takes no key-value cache"
    )
    assert len(calls) == 2 * (3 + 2) and all(lists.block_size == (128, 128) for lists in calls)
    for lists in calls:
        assert lists.mask_block_cnt.dtype == lists.full_block_idx.dtype == torch.int32
        assert lists.mask_block_cnt.shape[:2] == lists.mask_block_idx.shape[:2] == (1, 1)
    assert "up to 128, not 192" in dispatch.unsupported_reason("flash-attn-4", case(head_dim=192))
    monkeypatch.setattr(flash_attn_4, "wants_deterministic", lambda: True)
    assert "not deterministic" in dispatch.unsupported_reason("flash-attn-4", case())
    assert dispatch.unsupported_reason("flash-attn-4", case(needs_grad=False)) == ""


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("flash-attn-2", "pip install flash-attn"),
        ("flash-attn-3", "pip install flash-attn-3"),
        ("flash-attn-4", "pip install flash-attn-4"),
    ],
)
def test_an_absent_package_says_how_to_get_it(monkeypatch, name, command):
    monkeypatch.setattr(availability, "installed_version", lambda distribution: None)
    monkeypatch.setattr(availability, "has_module", lambda module: False)
    layout = lk.TokenLayout.from_spans(DOCUMENTS)
    kind = dict(dtype=torch.bfloat16, num_heads=4, num_kv_heads=2, head_dim=64, needs_grad=True)
    with pytest.raises(ValueError, match=f"{name} attention was asked for, but .* is not installed; `{command}"):
        dispatch.choose_kernel(name, layout, device=torch.device("cpu"), **kind)


@pytest.mark.parametrize("keys", [[5e9, 4.5e9], [5e9, 5e9], [-3e12, -3e12], [float("-inf"), float("-inf")]])
def test_plain_attention_at_huge_scores(keys):
    q = torch.ones(1, 1, 1)
    k, v = torch.tensor(keys)[:, None, None], torch.tensor([1.0, 2.0])[:, None, None]
    start, end = torch.tensor([0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    out, _ = dense_attention(q, k, v, start, end, 1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), scale=1.0)
    torch.testing.assert_close(out, expected.transpose(0, 1))
