"""Hybrid attention: `dispatch` chooses and calls a kernel; each kernel is one file of this folder.

No kernel imports an optional package before it is considered for a call.

| name           | what it is                                                        | needs                         |
| -------------- | ----------------------------------------------------------------- | ----------------------------- |
| native         | C++ (csrc/cpu/hybrid_attention_op.cpp)                            | a CPU                         |
| triton         | Triton, from the layout's vectors                                 | CUDA, triton                  |
| flash          | two causal calls of PyTorch's FlashAttention-2                    | CUDA 8.0                      |
| flash-attn-2   | two causal calls of FlashAttention-2                              | CUDA 8.0, flash-attn          |
| flash-attn-3   | two causal calls of FlashAttention-3                              | CUDA 9.0, flash-attn-3        |
| flash-attn-4   | FlashAttention-4 with block lists of the mask; no hidden spans    | CUDA 9.0, flash-attn-4        |
| flex           | FlexAttention with a block mask                                   | CUDA 8.0, or a CPU to compare |
| reference      | plain PyTorch                                                     | nothing                       |
"""
