"""GGUF files of random LLMs, in the layout of llama.cpp's converter."""

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def random_llm(config):
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return llm


def gguf_name(name):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def permute(weight, num_heads):
    """What llama.cpp's converter does to q and k of the llama architecture."""
    return (
        weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path, llm, quantization=None, metadata=None, extra=None):
    """The LLM as llama.cpp's converter writes it; `metadata` and `extra` tensors come on top."""
    config = llm.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
    for key, value in (metadata or {}).items():
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            list: writer.add_array,
        }[type(value)]
        add(key.format(arch=architecture), value)
    for name, tensor in llm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        if quantization is None or array.ndim == 1:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(array, quantization), raw_dtype=quantization)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(path, metadata):
    """A random Llama with an embedding of as many rows as `metadata` has tokens."""
    vocab_size = len(metadata.get("tokenizer.ggml.tokens", range(40)))
    return write_gguf(path, random_llm(LlamaConfig(vocab_size=vocab_size, **SIZES)), metadata=metadata)


def byte_level_metadata(pre="gpt-2", words=(), control=("<|endoftext|>",), plain=(), **more):
    """A byte-level vocabulary: bytes, `words` that merges make of their bytes, control and user-defined tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(w)[0][0] for w in words
    ]
    tokens, merges = list(alphabet), []
    for word in spelled or ["ab"]:  # an empty list of merges cannot be written
        for i in range(1, len(word)):
            if word[: i + 1] not in tokens:
                tokens.append(word[: i + 1])
                merges.append(f"{word[:i]} {word[i]}")
    types = [NORMAL] * len(tokens) + [CONTROL] * len(control) + [USER_DEFINED] * len(plain)
    tokens += [*control, *plain]
    named = {"tokenizer.ggml.eos_token_id": tokens.index(control[0])} if control else {}
    if pre is not None:
        named["tokenizer.ggml.pre"] = pre
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **named,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }
