"""The scan for fences finds a missing one, and accepts good code."""

import pytest

from tests.kernels.compile.proxy_fences import Unfenced, unfenced_reads

KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 p)
.reqntid 128
{{
  .reg .pred %p<3>;
  .loc 1 2 3
  mov.b32 %r0, global_smem; // st.shared in a comment
{body}
  ret;
}}
.section .debug_info {{ .b8 1; }}
"""
COPY = "cp.async.cg.shared.global [ %r0 + 0 ], [ %rd1 + 0 ], 0x10, %r2;"
PREDICATED_COPY = "@%p1 " + COPY
COMMIT, WAIT, WAIT_1 = "cp.async.commit_group;", "cp.async.wait_group 0x0;", "cp.async.wait_group 1;"
FENCE, STORE, BARRIER = "fence.proxy.async.shared::cta;", "st.shared.v4.b32 [%r0], {%r1, %r2, %r3, %r4};", "bar.sync 0;"
WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16\n {%f0,%f1,%f2,%f3}, %rd2, %rd3, %p2, 1, 1, 0, 1;"
BULK_STORE = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd4, {%r5, %r6}], [%r0];"
BULK_LOAD = (
    "@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%rd4, {%r5, %r6}], [%r7];"
)
WAIT_LOOP = """{
  .reg .pred complete;
  waitLoop:
  mbarrier.try_wait.parity.shared.b64 complete, [%r7], %r8;
  @!complete bra.uni waitLoop;
}"""


def scan(*body):
    return unfenced_reads(KERNEL.format(body="\n".join(body)))


def loop(*body):
    return ("$L__BB0_1:", *body, "@%p1 bra $L__BB0_1;")


GOOD = {
    "nothing written": [WGMMA],
    "by the async proxy": [BULK_LOAD, WAIT_LOOP, WGMMA, BULK_LOAD, WAIT_LOOP, WGMMA],
    "copied and fenced": [COPY, COMMIT, WAIT, FENCE, BARRIER, WGMMA],
    "fenced behind the barrier": [PREDICATED_COPY, COMMIT, WAIT, BARRIER, FENCE, WGMMA],
    "stored and fenced": [STORE, FENCE, BARRIER, WGMMA, STORE, FENCE, BARRIER, BULK_STORE],
    "the next tile is on its way": [COPY, COMMIT, WAIT, FENCE, COPY, COMMIT, WGMMA],
    "pipelined": [COPY, COMMIT, *loop(COPY, COMMIT, WAIT_1, FENCE, WGMMA)],
    "stored behind the last read": [WGMMA, STORE, BARRIER],
    "no read at all": [STORE, BARRIER, COPY, COMMIT, WAIT],
    "fenced on both ways": ["@%p1 bra $L2;", STORE, FENCE, "bra.uni $L3;", "$L2:", COPY, WAIT, FENCE, "$L3:", WGMMA],
    "never comes there": [STORE, "bra.uni $L2;", WGMMA, "$L2:"],
    "over before": [STORE, "ret;", WGMMA],
}
BAD = {
    "copied": [COPY, COMMIT, WAIT, BARRIER, WGMMA],
    "copied by some threads": [PREDICATED_COPY, COMMIT, WAIT, BARRIER, WGMMA],
    "waited for all": [COPY, "cp.async.wait_all;", BARRIER, WGMMA],
    "fenced too early": [COPY, COMMIT, FENCE, WAIT, BARRIER, WGMMA],
    "stored": [STORE, BARRIER, WGMMA],
    "stored as a matrix": ["stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r0], {%r1, %r2, %r3, %r4};", WGMMA],
    "added to": ["atom.shared.add.u32 %r1, [%r0], %r2;", WGMMA],
    "stored for a bulk copy": [STORE, BARRIER, BULK_STORE],
    "fenced in the first round alone": [COPY, COMMIT, WAIT, FENCE, *loop(WGMMA, COPY, COMMIT, WAIT)],
    "pipelined": [COPY, COMMIT, *loop(COPY, COMMIT, WAIT_1, BARRIER, WGMMA)],
    "waited for some, fenced, waited for the others": [COPY, COPY, COMMIT, WAIT_1, FENCE, WAIT, WGMMA],
    "fenced on one way": [STORE, "@%p1 bra $L2;", FENCE, "$L2:", WGMMA],
    "fenced by some threads": [STORE, "@%p1 " + FENCE, WGMMA],
    "another fence": [STORE, "fence.proxy.tensormap::generic.release.gpu;", WGMMA],
    "a loop with a label of its own between": [STORE, WAIT_LOOP, WAIT_LOOP, WGMMA],
}


@pytest.mark.parametrize("name", GOOD)
def test_good_code_passes(name):
    assert scan(*GOOD[name]) == []


@pytest.mark.parametrize("name", BAD)
def test_a_missing_fence_is_seen(name):
    assert len(scan(*BAD[name])) == 1


def test_what_it_says():
    (found,) = scan(STORE, BARRIER, WGMMA)
    assert found == Unfenced("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", "st.shared.v4.b32")
    assert "no fence.proxy.async between" in str(found)


def test_every_kernel_of_a_file_is_scanned():
    bad = KERNEL.format(body="\n".join((STORE, WGMMA)))
    assert len(unfenced_reads(KERNEL.format(body=WGMMA) + bad)) == 1


@pytest.mark.parametrize("body", ["brx.idx %r1, $table;", "st.shared.b32 [%r0], %r1"], ids=["unknown branch", "no PTX"])
def test_what_it_cannot_read_is_an_error(body):
    with pytest.raises(ValueError, match=r"unknown branch|not PTX"):
        unfenced_reads(".entry kernel() {\n" + WGMMA + body + "\n}")
