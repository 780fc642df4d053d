// The CPU kernels of hybrid attention for one instruction set: entry points by element type.

#include "hybrid_attention.h"

#include "hybrid_attention_backward.h"
#include "hybrid_attention_forward.h"

namespace lmf::LMF_ISA {

int64_t forward_scratch(const Attention& attention) { return ForwardScratch(attention, nullptr).size; }

int64_t backward_scratch(const Attention& attention) { return BackwardScratch(attention, nullptr).size; }

void pack_keys(const Attention& attention, int64_t task) {
  attention.is_bfloat16 ? pack_keys_of<bfloat16>(attention, task) : pack_keys_of<float>(attention, task);
}

void attention_forward(const AttentionForward& problem, int64_t task, int64_t worker) {
  problem.is_bfloat16 ? forward_task<bfloat16>(problem, task, worker) : forward_task<float>(problem, task, worker);
}

void attention_backward(const AttentionBackward& problem, int64_t task, int64_t worker) {
  problem.is_bfloat16 ? backward_task<bfloat16>(problem, task, worker) : backward_task<float>(problem, task, worker);
}

void store_key_grads(const AttentionBackward& problem, int64_t begin, int64_t end) {
  problem.is_bfloat16 ? store_key_grads_of<bfloat16>(problem, begin, end)
                      : store_key_grads_of<float>(problem, begin, end);
}

}  // namespace lmf::LMF_ISA
