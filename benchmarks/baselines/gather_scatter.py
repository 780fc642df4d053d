"""A two-tower layer routed as most published training code does it (BAGEL is the best known).

At every step of the layer the rows of a tower are gathered by index, sent through that tower's module, and scattered
into a buffer of zeros.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmfusion_kernels import BlockWeights, TokenLayout
from lmfusion_kernels.weights import Rope


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class GatherScatterLayer(nn.Module):
    """Takes and returns rows [N, d] in sequence order; weights as in `BlockWeights`, q, k, v, gate and up unstacked."""

    def __init__(
        self, text: BlockWeights, image: BlockWeights, num_heads: int, num_kv_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.eps = text.eps
        sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        for tower, w in (("text", text), ("image", image)):
            q, k, v = w.qkv_proj.split(sizes)
            gate, up = w.gate_up_proj.chunk(2)
            named = dict(q=q, k=k, v=v, o=w.o_proj, gate=gate, up=up, down=w.down_proj, norm_in=w.input_layernorm,
                         norm_out=w.post_attention_layernorm, q_norm=w.q_norm, k_norm=w.k_norm)  # fmt: skip
            for name, value in named.items():
                self.register_parameter(f"{tower}_{name}", nn.Parameter(value.detach().clone()))

    def weight(self, tower: str, name: str) -> Tensor:
        return getattr(self, f"{tower}_{name}")

    def routed(self, x: Tensor, rows: dict[str, Tensor], width: int, function) -> Tensor:
        out = x.new_zeros((x.shape[0], width))
        for tower, index in rows.items():
            out[index] = function(x[index], tower)
        return out

    def forward(self, x: Tensor, layout: TokenLayout, rope: Rope, mask: Tensor) -> Tensor:
        rows = {
            "text": layout.tower_to_sequence[: layout.num_text].long(),
            "image": layout.tower_to_sequence[layout.num_text :].long(),
        }
        d, w = x.shape[1], self.weight
        h = self.routed(x, rows, d, lambda r, t: rms_norm(r, w(t, "norm_in"), self.eps))
        heads = {}
        for name, count in (("q", self.num_heads), ("k", self.num_kv_heads), ("v", self.num_kv_heads)):
            flat = self.routed(h, rows, count * self.head_dim, lambda r, t, name=name: F.linear(r, w(t, name)))
            heads[name] = flat.view(-1, count, self.head_dim)
        for name in ("q", "k"):
            normed = torch.zeros_like(heads[name])
            for tower, index in rows.items():
                normed[index] = rms_norm(heads[name][index], w(tower, f"{name}_norm"), self.eps)
            cos, sin = (torch.cat([table, table], dim=-1)[:, None].to(x.dtype) for table in rope)
            heads[name] = normed * cos + rotate_half(normed) * sin
        q, k, v = (heads[name].transpose(0, 1)[None] for name in ("q", "k", "v"))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1).flatten(1)
        x = x + self.routed(out, rows, d, lambda r, t: F.linear(r, w(t, "o")))
        h = self.routed(x, rows, d, lambda r, t: rms_norm(r, w(t, "norm_out"), self.eps))

        def mlp(r: Tensor, t: str) -> Tensor:
            return F.linear(F.silu(F.linear(r, w(t, "gate"))) * F.linear(r, w(t, "up")), w(t, "down"))

        return x + self.routed(h, rows, d, mlp)
