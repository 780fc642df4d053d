// The schemas of the native ops, torch.ops.lmfusion. csrc/cpu/<op>_op.cpp and csrc/cuda/<op>.cu register the
// implementations, lmfusion_kernels/ops/<op>.py the shapes under tracing and the autograd formulas.
//
// Tensor[] of rows: one tensor [N, d] in tower order, or the two towers' own tensors [num_text, d_text] and
// [num_image, d_image]. Results come in the same form. Counts that differ from batch to batch are SymInt, so that
// torch.compile does not compile again for each.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(lmfusion, m) {
  // residual: [] or like x. Returns [*y, *(x + residual) if residual, *kept, rstd]; rstd is float32 [N]. kept: copies
  // of rows of what was normalised (x, or the sum), in tensors of their own, so that it can be freed: the text rows
  // from num_constant on if keep_text, the image rows if keep_image.
  m.def(
      "rms_norm(Tensor[] x, Tensor[] residual, Tensor text_weight, Tensor image_weight, SymInt num_text, float eps, "
      "SymInt num_constant=0, bool keep_text=False, bool keep_image=False) -> Tensor[]");
  // dresidual: [] or like x, added to dx. Returns [*dx, dtext_weight if text_grad, dimage_weight if image_grad,
  // *y if recompute].
  m.def(
      "rms_norm_backward(Tensor[] dy, Tensor[] x, Tensor rstd, Tensor text_weight, Tensor image_weight, "
      "SymInt num_text, Tensor[] dresidual, bool text_grad, bool image_grad, bool recompute) -> Tensor[]");

  // gate_up [n, 2 I] -> [n, I], for each tensor of the list; if keep, followed by a copy of the rows from num_constant
  // on of gate_up[0].
  m.def("swiglu(Tensor[] gate_up, SymInt num_constant=0, bool keep=False) -> Tensor[]");
  // Returns [*dgate_up, *y if recompute].
  m.def("swiglu_backward(Tensor[] dy, Tensor[] gate_up, bool recompute) -> Tensor[]");

  // Tower row t goes to row tower_to_sequence[t] of k and v; its query to row query_row[t] of q_constant followed by q.
  // cos, sin: float32 [N, D/2] by sequence index.
  m.def(
      "rope_reorder(Tensor[] qkv, Tensor cos, Tensor sin, Tensor tower_to_sequence, Tensor query_row, SymInt num_text, "
      "SymInt num_constant, int num_heads, Tensor? text_q_norm, Tensor? text_k_norm, Tensor? image_q_norm, "
      "Tensor? image_k_norm, float eps) -> (Tensor q_constant, Tensor q, Tensor k, Tensor v)");
  // The same for few rows with a cache: returns q in sequence order and writes key and value of the token with sequence
  // index s to slot key_slot[s] of the caches [slots, H_kv, D].
  m.def(
      "rope_reorder_cached(Tensor[] qkv, Tensor cos, Tensor sin, Tensor tower_to_sequence, Tensor key_slot, "
      "SymInt num_text, int num_heads, Tensor? text_q_norm, Tensor? text_k_norm, Tensor? image_q_norm, "
      "Tensor? image_k_norm, float eps, Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor q");
  // Gradients of rank r go to row active_row[r] of [live | image]; its angles are row active_key[r] of cos, sin (None:
  // row r). qkv (the op's input in that order) may be [] without norms. Returns [dqkv of live, dqkv of image], or one
  // tensor if joined, followed by the wanted gradients of the norms that are given, in the order of the arguments.
  m.def(
      "rope_reorder_backward(Tensor dq, Tensor dk, Tensor dv, Tensor[] qkv, Tensor cos, Tensor sin, Tensor active_row, "
      "Tensor? active_key, SymInt num_live, int num_heads, Tensor? text_q_norm, Tensor? text_k_norm, "
      "Tensor? image_q_norm, Tensor? image_k_norm, float eps, bool text_norm_grad, bool image_norm_grad, "
      "bool joined=False) -> Tensor[]");

  // Row i of the result is row index[i] of x [N, ...], any dtype. index is a permutation, inverse the opposite one.
  m.def("reorder_rows(Tensor x, Tensor index, Tensor inverse) -> Tensor");

  // Query i sees the keys [key_start[i], key_end[i]) (int32, non-decreasing); its result is row out_row[i] of out
  // (None: row i). lse: float32 [H, Nq], the log of the sum of exp(score), by query. visible_end (None, or int32 [Nk]):
  // key j is seen only by the queries before visible_end[j]. run_end, given with it: the keys from j up to run_end[j]
  // have one visible_end, and no range begins after the first of them.
  m.def(
      "hybrid_attention(Tensor q, Tensor k, Tensor v, Tensor key_start, Tensor key_end, Tensor? out_row, float scale, "
      "Tensor? visible_end=None, Tensor? run_end=None) -> (Tensor out, Tensor lse)");
  // dk, dv: one row for each key listed in grad_key (int32, ascending); key r of the list is seen by the queries
  // [query_start[r], query_end[r]), whose ends need not ascend if visible_end is given. dout and out are read at
  // out_row[i].
  m.def(
      "hybrid_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor key_start, "
      "Tensor key_end, Tensor grad_key, Tensor query_start, Tensor query_end, Tensor? out_row, float scale, "
      "Tensor? visible_end=None, Tensor? run_end=None) "
      "-> (Tensor dq, Tensor dk, Tensor dv)");
}
