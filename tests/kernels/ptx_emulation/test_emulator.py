"""The emulator itself: small PTX programs with known results, and programs with one fault each, which it must find."""

import numpy as np
import pytest

from tests.kernels.ptx_emulation.block import Schedule, launch
from tests.kernels.ptx_emulation.memory import GlobalMemory, TensorMap
from tests.kernels.ptx_emulation.parser import parse
from tests.kernels.ptx_emulation.values import EmulationError, float32_to_bfloat16

HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def run(body, *, count=64, threads=64, shared=1024, is_written=True, schedule=None):
    """What a kernel of one block leaves in `out`, uint32 [count]."""
    ptx = f"{HEADER}.visible .entry kernel(.param .u64 out)\n.reqntid {threads}\n{{\n{body}\nret;\n}}"
    out = np.zeros(count, np.uint32)
    memory = GlobalMemory()
    address = memory.add(out.view(np.uint8), "out", is_written)
    kernel = parse(ptx)
    arguments = (kernel, (1, 1, 1), np.uint64(address).tobytes(), memory, {}, threads, shared)
    launch(*arguments, schedule or Schedule())
    return out


STORE = """
.reg .b32 %r<20>; .reg .b64 %rd<9>; .reg .pred %p<9>; .reg .f32 %f<9>;
ld.param.u64 %rd1, [out]; mov.u32 %r1, %tid.x; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
"""


def bits(values):
    return np.asarray(values, np.float32).view(np.uint32)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.s32 %r2, %r1, -5;", lambda t: (t.astype(np.int32) - 5).view(np.uint32)),
        ("shl.b32 %r2, %r1, 30;", lambda t: t << np.uint32(30)),
        ("shl.b32 %r2, 1, %r1;", lambda t: np.where(t < 32, np.uint32(1) << np.minimum(t, 31).astype(np.uint32), 0)),
        ("neg.s32 %r3, %r1; shr.s32 %r2, %r3, 2;", lambda t: (-t.astype(np.int32) >> 2).view(np.uint32)),
        ("bfe.u32 %r2, 0x12345678, %r1, 8;", lambda t: (np.uint64(0x12345678) >> t.astype(np.uint64)) & np.uint64(255)),
        ("prmt.b32 %r2, 0x33221100, 0x77665544, 0x4126;", lambda t: np.full(64, 0x44112266)),
        ("lop3.b32 %r2, %r1, 12, 10, 0xE8;", lambda t: t & 12 | t & 10 | 12 & 10),
        ("mul.hi.u32 %r2, %r1, 0x80000000;", lambda t: t // 2),
        ("neg.s32 %r3, %r1; div.s32 %r2, %r3, 7;", lambda t: (-(t.astype(np.int32) // 7)).view(np.uint32)),
        ("setp.lt.u32 %p1, %r1, 9; selp.b32 %r2, 1, 2, %p1;", lambda t: np.where(t < 9, 1, 2)),
        ("cvt.rn.f32.u32 %f1, %r1; fma.rn.f32 %f2, %f1, %f1, 0f3F800000; mov.b32 %r2, %f2;", lambda t: bits(t * t + 1)),
        ("cvt.rn.f32.u32 %f1, %r1; cvt.rn.bf16x2.f32 %r2, %f1, 0f00000000;",
         lambda t: float32_to_bfloat16(t.astype(np.float32)).astype(np.uint32) << np.uint32(16)),
        ("shfl.sync.bfly.b32 %r2, %r1, 5, 0x1f, -1;", lambda t: t ^ 5),
        ("redux.sync.max.u32 %r2, %r1, -1;", lambda t: t | 31),
        ("vote.sync.ballot.b32 %r2, %p0, -1;", lambda t: np.zeros(64)),
    ],
)  # fmt: skip
def test_instructions(code, expected):
    out = run(f"{STORE}{code} st.global.b32 [%rd3], %r2;")
    assert (out == np.asarray(expected(np.arange(64, dtype=np.uint32))).astype(np.uint32)).all()


@pytest.mark.parametrize("is_skewed", [False, True])
def test_loops_predicates_and_barriers(is_skewed):
    """Every thread counts to its own number, writes it to shared memory, and reads its neighbour's."""
    out = run(
        f"""{STORE} .extern .shared .align 16 .b8 memory[];
        mov.u32 %r2, 0;
        $again: setp.ge.u32 %p1, %r2, %r1; @%p1 bra $done; add.u32 %r2, %r2, 1; bra $again;
        $done: shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r2; bar.sync 0;
        xor.b32 %r4, %r3, 252; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd3], %r5;""",
        schedule=Schedule(is_skewed=is_skewed),
    )
    assert (out == np.arange(64)[::-1]).all()


def test_a_missing_barrier_is_noticed_where_warps_run_ahead():
    """The second warp writes what the first one reads."""
    body = f"""{STORE} setp.lt.u32 %p1, %r1, 32; shl.b32 %r3, %r1, 2; @!%p1 st.shared.b32 [%r3], %r1; BARRIER
    @!%p1 bra $end; xor.b32 %r4, %r3, 128; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd3], %r5; $end:"""
    schedules = [Schedule(seed=seed, is_skewed=True) for seed in range(8)]
    right = np.arange(32, 64)
    assert all((run(body.replace("BARRIER", "bar.sync 0;"), schedule=each)[:32] == right).all() for each in schedules)
    assert any((run(body.replace("BARRIER", ""), schedule=each)[:32] != right).any() for each in schedules)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("st.global.b32 [%rd3+256], %r1;", r"out has 256 bytes; \[256, 512\) is accessed"),
        ("ld.global.b32 %r2, [%rd3+1];", "not a multiple"),
        ("ld.shared.b32 %r2, [%r1];", "misaligned access to shared memory"),
        ("shl.b32 %r2, %r1, 6; ld.shared.b32 %r3, [%r2];", "beyond the 1024 bytes of shared memory"),
        ("setp.lt.u32 %p1, %r1, 9; @%p1 bar.sync 0;", "deadlock at @%p1 bar.sync 0"),
        (
            "setp.lt.u32 %p1, %r1, 9; @%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;",
            "a lane is read that takes no part",
        ),
        ("trap;", "the kernel traps"),
        ("sin.approx.f32 %f1, %f2;", "not emulated: sin.approx.f32"),
        ("mov.u32 %r2, 0; mbarrier.try_wait.parity.shared.b64 %p1, [%r2], 0;", "there is no mbarrier at 0"),
    ],
)
def test_faults(code, message):
    with pytest.raises(EmulationError, match=message):
        run(STORE + code)


def test_what_may_only_be_read_is_not_written():
    with pytest.raises(EmulationError, match="out is written"):
        run(f"{STORE} st.global.b32 [%rd3], %r1;", is_written=False)


COPY = f"""{STORE} shl.b32 %r3, %r1, 2;
cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group; WAIT
ld.shared.b32 %r5, [%r3]; add.u32 %r5, %r5, 1; st.global.b32 [%rd3], %r5;"""


def test_a_copy_arrives_when_it_is_waited_for():
    assert (run(COPY.replace("WAIT", "cp.async.wait_group 0;")) == 1).all()
    assert (run(COPY.replace("WAIT", "")) == 0).all()  # poison, all bits set, and 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(base=8), "the base must be a multiple of 16"),
        (dict(strides=(20,)), "strides must be multiples of 16"),
        (dict(box=(128, 300)), "1 to 256 elements a dimension"),
        (dict(box=(128, 8)), "at most 128 bytes"),
        (dict(box=(4, 8)), "a multiple of 16 bytes"),
    ],
)
def test_tensor_maps_that_cuda_refuses(arguments, message):
    fitting = dict(base=0, element_size=2, sizes=(128, 50), strides=(256,), box=(64, 8), swizzle=3)
    TensorMap(**fitting)
    with pytest.raises(EmulationError, match=message):
        TensorMap(**fitting | arguments)


def test_boxes_are_swizzled_and_cut_at_the_borders():
    """By the definition: 16-byte units of a row of 128 bytes change places with the row's number modulo 8."""
    tensor_map = TensorMap(base=4096, element_size=2, sizes=(100, 50), strides=(256,), box=(64, 16), swizzle=3)
    to, of, is_inside = tensor_map.elements([64, 40], 1024)
    row, column = np.arange(16)[:, None], np.arange(64)[None]
    assert (to == 1024 + 128 * row + ((column // 8 ^ row % 8) * 16 + column % 8 * 2)).all()
    assert (of == 4096 + (40 + row) * 256 + (64 + column) * 2).all()
    assert (is_inside == ((40 + row < 50) & (64 + column < 100))).all()
