"""Packed causal attention in plain PyTorch with FlashAttention's conventions; stands in for the packages."""

import torch


class PlainPackedCausal:
    summary = "plain"

    def __init__(self):
        self.calls = []

    def unavailable_reason(self, device):
        return ""

    def unsupported_reason(self, case):
        return ""

    def forward(self, q, k, v, sequences, scale):
        self.check((q, k, v), sequences)
        out = torch.full_like(q, float("nan"))
        lse = q.new_full((q.shape[1], q.shape[0]), float("nan"))
        for queries, keys in self.slices(sequences):
            scores = self.scores(q[queries], k[keys], scale)
            lse[:, queries] = scores.logsumexp(-1)
            out[queries] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), self.expand(v[keys], q))
        return out, lse

    def backward(self, dout, q, k, v, out, lse, sequences, scale):
        assert sequences.num_keys is None
        self.check((q, k, v, dout, out), sequences)
        dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, k, v))
        for queries, keys in self.slices(sequences):
            weights = (self.scores(q[queries], k[keys], scale) - lse[:, queries, None]).exp()
            delta = (dout[queries] * out[queries]).sum(-1).t()[..., None]
            dweights = torch.einsum("nhd,mhd->hnm", dout[queries], self.expand(v[keys], q))
            dscores = weights * (dweights - delta) * scale
            dq[queries] = torch.einsum("hnm,mhd->nhd", dscores, self.expand(k[keys], q))
            dk[keys] = self.reduce(torch.einsum("hnm,nhd->mhd", dscores, q[queries]), k)
            dv[keys] = self.reduce(torch.einsum("hnm,nhd->mhd", weights, dout[queries]), v)
        return dq, dk, dv

    def check(self, tensors, sequences):
        """What the CUDA kernels require, checked or unchecked."""
        q, k, v, *_ = tensors
        query_start, key_start, num_keys = sequences.query_start, sequences.key_start, sequences.num_keys
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (query_start, key_start))
        assert query_start.shape == key_start.shape and query_start[0] == 0 and query_start[-1] == q.shape[0]
        assert k.shape == v.shape and key_start[-1] <= k.shape[0]
        for x in tensors:  # loads of 16 bytes
            assert x.stride(-1) == 1 and x.storage_offset() % 8 == 0
            assert all(step % 8 == 0 for step, size in zip(x.stride(), x.shape, strict=True) if size > 1 and step != 1)
        lengths = key_start.diff()
        assert (lengths >= 0).all()
        if num_keys is not None:
            assert num_keys.dtype == torch.int32 and num_keys.is_contiguous() and num_keys.shape == lengths.shape
            assert (key_start[:-1] + num_keys <= k.shape[0]).all()
            lengths = num_keys
        assert query_start.diff().max() <= sequences.max_queries and lengths.max() <= sequences.max_keys
        self.calls.append((q.shape[0], k.shape[0]))

    @staticmethod
    def slices(sequences):
        query_start, key_start, num_keys = sequences.query_start, sequences.key_start, sequences.num_keys
        for b in range(len(query_start) - 1):
            first, end = int(key_start[b]), int(key_start[b + 1])
            if num_keys is not None:
                end = first + int(num_keys[b])
            yield slice(int(query_start[b]), int(query_start[b + 1])), slice(first, end)

    def scores(self, q, k, scale):
        n, m = q.shape[0], k.shape[0]
        visible = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        return (torch.einsum("nhd,mhd->hnm", q, self.expand(k, q)) * scale).masked_fill(~visible, float("-inf"))

    @staticmethod
    def expand(x, q):
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)

    @staticmethod
    def reduce(grad, like):
        return grad.unflatten(1, (like.shape[1], -1)).sum(2)
