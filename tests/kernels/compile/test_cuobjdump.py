"""The checks of compiled kernels detect local memory, narrow loads and missing kernels."""

import subprocess
from pathlib import Path

import pytest

from tests.kernels.compile import cuobjdump

PTX = """
.version 8.0
.target {architecture}
.address_size 64
.visible .entry _ZN3lmf12_GLOBAL__N_111good_kernelIfLi4EEEvPf(.param .u64 p) {{
  .reg .b64 %rd<2>; .reg .f32 %f<5>;
  ld.param.u64 %rd0, [p];
  ld.global.v4.f32 {{%f0, %f1, %f2, %f3}}, [%rd0];
  add.f32 %f0, %f0, %f1;
  st.global.v4.f32 [%rd0 + 16], {{%f0, %f1, %f2, %f3}};
  ret;
}}
.visible .entry bad_kernel(.param .u64 p, .param .u32 i) {{
  .local .align 4 .b8 array[256];
  .reg .b64 %rd<8>; .reg .b32 %r<4>; .reg .f32 %f<3>;
  ld.param.u64 %rd0, [p];
  ld.param.u32 %r0, [i];
  mov.u64 %rd1, array;
  mul.wide.u32 %rd2, %r0, 4;
  add.u64 %rd3, %rd1, %rd2;
  ld.global.f32 %f0, [%rd0];
  st.local.f32 [array], %f0;
  st.local.f32 [%rd3], %f0;
  ld.local.f32 %f1, [array + 4];
  st.global.f32 [%rd0], %f1;
  ret;
}}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90a"])
def kernels(request, tmp_path_factory):
    program = cuobjdump.find()
    if program is None or not (ptxas := Path(program).with_name("ptxas")).exists():
        pytest.skip("there is no ptxas beside cuobjdump: it comes with triton and with CUDA")
    source = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    source.write_text(PTX.format(architecture=request.param))
    cubin = source.with_suffix(".cubin")
    subprocess.run([str(ptxas), f"-arch={request.param}", str(source), "-o", str(cubin)], check=True)
    found = cuobjdump.kernels(cubin)
    assert {kernel.architecture for kernel in found} == {request.param}
    return {kernel.name: kernel for kernel in found}


def test_a_good_kernel(kernels):
    good = kernels["good_kernel"]
    assert (good.stack, good.local_accesses) == (0, 0)
    assert 4 <= good.registers <= 16
    assert good.count("LDG") == good.count("LDG", "128") == good.count("STG", "128") == 1


def test_local_memory_and_narrow_loads_are_seen(kernels):
    bad = kernels["bad_kernel"]
    assert bad.stack == 256
    assert bad.local_accesses == 3
    assert bad.count("LDG") == 1 and bad.count("LDG", "128") == 0


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN3lmf36_GLOBAL__N__2541c49f_4_a_cu_819ffe283toyIfEEvPK5uint4PS2_i", "toy"),
        ("_ZN3lmf4cuda12_GLOBAL__N_113swiglu_kernelINS_8bfloat16ELi8EEEvNS1_12SwigluTowersIT_EE", "swiglu_kernel"),
        ("_Z6kernelPf", "kernel"),
        ("attention_forward", "attention_forward"),
    ],
)
def test_names(symbol, name):
    assert cuobjdump.source_name(symbol) == name
