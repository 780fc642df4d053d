"""GGUF files: every key that changes what a model computes is read or refused; damaged headers are refused fast."""

import random
import struct
import time

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from lmfusion.conversion import load_base
from lmfusion.conversion.gguf_header import read_header
from lmfusion.model.modeling import LMFusion
from tests.lmfusion.conversion.gguf_files import SIZES, byte_level_metadata, random_llm, tiny_gguf, write_gguf

IMAGE = {"hidden_size": 16, "patch_coder": {"kind": "linear"}}
CODEC = {"kind": "pixels", "channels": 1, "image_size": 4}
THETA = 500.0


def llama(**rope):
    rope = {"rope_type": "default", "rope_theta": THETA} | rope
    return random_llm(LlamaConfig(vocab_size=40, **SIZES, rope_parameters=rope))


def logits(path):
    ids = torch.randint(0, 40, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return LMFusion.from_base(load_base(path), IMAGE, CODEC, None)(ids).logits, ids


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scale_linear": 4.0}, LINEAR),
        ({"scaling.factor": 4.0}, LINEAR),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, LINEAR),
        ({"scaling.type": "linear", "scale_linear": 4.0}, LINEAR),
        ({"scaling.type": "linear"}, {}),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, {}),
        ({"scaling.type": "none", "scaling.factor": 4.0}, {}),
        ({"scaling.type": "none", "scale_linear": 4.0}, {}),
        ({"scaling.original_context_length": 16}, {}),
        ({"scaling.attn_factor": 1.0}, {}),
        ({"scaling.finetuned": True}, {}),
        ({"dimension_count": 8}, {}),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}, YARN),
        ({"scaling.type": "yarn", "scale_linear": 4.0, "scaling.original_context_length": 16}, YARN),
        # Without the length, that of the file's context
        ({"scaling.type": "yarn", "scaling.factor": 4.0}, YARN | {"original_max_position_embeddings": 256}),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.attn_factor": 0.5,
            },
            # ggml multiplies by 1 + 0.1 ln(factor) whatever the file's factor is
            YARN | {"attention_factor": 0.5 * (1 + 0.1 * np.log(4.0))},
        ),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 32.0,
                "scaling.yarn_beta_slow": 1.0,
                "scaling.yarn_ext_factor": 1.0,
                "scaling.yarn_attn_factor": 1.0,
                "scaling.yarn_log_multiplier": 0.0,
            },
            YARN,
        ),
    ],
)
def test_rope_keys(tmp_path, keys, rope):
    llm = llama(**rope)
    metadata = {f"{{arch}}.rope.{key}": value for key, value in keys.items()}
    ours, ids = logits(write_gguf(tmp_path / "llm.gguf", llm, metadata=metadata))
    with torch.no_grad():
        torch.testing.assert_close(ours, llm(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ({"rope.scaling.type": "dynamic"}, "rope scaling 'dynamic'"),
        ({"rope.scaling.attn_factor": 1.19}, "attn_factor"),
        ({"rope.scaling.alpha": 1000.0}, r"llama\.rope\.scaling\.alpha = 1000"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier"),
        ({"rope.scaling.yarn_beta_fast": 16.0}, "yarn_beta_fast"),
        ({"rope.dimension_count": 4}, "rotates in part"),
        ({"rope.dimension_sections": [1, 1, 2]}, "dimension_sections"),
        ({"rope.freq_base_swa": 1e4}, "freq_base_swa"),
        ({"attention.value_length": 4}, "values of another length than keys"),
        ({"attention.scale": 0.5}, r"attention\.scale"),
        ({"attention.causal": False}, r"attention\.causal"),
        ({"attention.sliding_window_pattern": 6}, "sliding_window_pattern"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"embedding_scale": 12.0}, "embedding_scale"),
        ({"expert_count": 8, "expert_used_count": 2}, "a mixture of experts"),
    ],
)
def test_metadata_that_changes_the_model_is_named(tmp_path, keys, message):
    metadata = {f"{{arch}}.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "llm.gguf", llama(), metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} uses .*{message}"):
        load_base(path)


def test_metadata_that_changes_nothing(tmp_path):
    more = {"{arch}.expert_count": 0, "{arch}.attention.causal": True, "{arch}.vocab_size": 40, "general.name": "x"}
    load_base(write_gguf(tmp_path / "llm.gguf", llama(), metadata=more))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"{arch}.rope.scaling.factor": "big"}, "rope.scaling.factor must be a number, got 'big'"),
        ({"{arch}.rope.scaling.factor": -4.0}, "factor must be a finite number above 0, got -4"),
        ({"{arch}.rope.scaling.factor": float("nan")}, "factor must be a finite number above 0, got nan"),
        ({"split.count": 3}, "one of several parts"),
    ],
)
def test_metadata_that_cannot_be_right(tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        load_base(write_gguf(tmp_path / "llm.gguf", llama(), metadata=keys))


def test_a_table_of_rope(tmp_path):
    def with_table(table, metadata=None):
        return write_gguf(
            tmp_path / "llm.gguf", llama(), metadata=metadata, extra={"rope_freqs.weight": np.array(table, np.float32)}
        )

    plain = logits(write_gguf(tmp_path / "plain.gguf", llama()))[0]
    assert torch.equal(logits(with_table([1.0] * 4))[0], plain)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight must hold 4 values, got \(3,\)"):
        load_base(with_table([1.0] * 3))
    for table in ([1.0, 2.0, 3.0, 4.0], [0.0] * 4, [float("nan")] * 4):
        with pytest.raises(ValueError, match="rope_freqs that are not Llama 3's"):
            load_base(with_table(table))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight with rope scaling 'linear'"):
        load_base(with_table([1.0, 1.0, 2.0, 32.0], {"{arch}.rope.scale_linear": 2.0}))


@pytest.mark.parametrize(
    "name",
    ["output.bias", "blk.0.attn_output.bias", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.2.attn_q.weight"],
)
def test_tensors_that_the_architecture_does_not_have_are_named(tmp_path, name):
    path = write_gguf(tmp_path / "llm.gguf", llama(), extra={name: np.zeros((32, 32), np.float32)})
    with pytest.raises(ValueError, match="do not belong to this architecture"):
        LMFusion.from_llm(path, IMAGE, CODEC)


def test_a_tensor_that_cannot_be_dequantised(tmp_path):
    llm = llama()
    path = write_gguf(tmp_path / "llm.gguf", llm, extra={"blk.9.x.weight": np.zeros((32, 32), np.int32)})
    with pytest.raises(ValueError, match=r"llm\.gguf: the tensor 'blk\.9\.x\.weight' cannot be read"):
        load_base(path)


def test_tensors_are_those_of_ggufs_own_reader(tmp_path):
    llm = random_llm(Qwen2Config(vocab_size=64, **SIZES))
    path = write_gguf(tmp_path / "llm.gguf", llm, gguf.GGMLQuantizationType.Q8_0, metadata=byte_level_metadata())
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert {tensor.name for tensor in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == ours.metadata


# Headers


def header(num_tensors=0, num_entries=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


HUGE = 2**63
ENTRY = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
HOSTILE = {
    "entries": header(num_entries=HUGE),
    "tensors": header(HUGE, 1, ENTRY),
    "a long name": header(num_entries=1, rest=struct.pack("<Q", HUGE) + b"x" * 20),
    "a long text": header(num_entries=1, rest=text(b"a") + struct.pack("<IQ", 8, HUGE)),
    "a long list": header(num_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, HUGE) + b"x" * 20),
    "a long list of texts": header(num_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, HUGE) + b"x" * 20),
    "a list of lists": header(num_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, HUGE) + b"x" * 20),
    "a list of nothing known": header(num_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 99, HUGE) + b"x" * 20),
    "a value of nothing known": header(num_entries=1, rest=text(b"a") + struct.pack("<I", 99) + b"x" * 20),
    "dimensions": header(1, 1, ENTRY + text(b"t") + struct.pack("<I", 2**31) + b"x" * 40),
    "a large tensor": header(1, 1, ENTRY + text(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
    "a far tensor": header(1, 1, ENTRY + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, HUGE)),
    "an empty tensor": header(1, 1, ENTRY + text(b"t") + struct.pack("<IQIQ", 1, 0, 0, 0)),
    "blocks": header(1, 1, ENTRY + text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0) + b"x" * 100),
    "a key twice": header(num_entries=2, rest=ENTRY + ENTRY),
    "no UTF-8": header(num_entries=1, rest=text(b"\xff\xfe") + struct.pack("<I", 4) + b"x" * 20),
    "alignment": header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 3)),
    "version": header(version=1),
    "byte order": header(version=3 << 24),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path, name):
    path = tmp_path / "llm.gguf"
    path.write_bytes(HOSTILE[name])
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"llm\.gguf is truncated or not a GGUF file"):
        load_base(path)
    assert time.monotonic() - start < 2


def test_changed_bytes_of_a_header_are_clear_errors_or_change_nothing(tmp_path):
    path = tiny_gguf(tmp_path / "llm.gguf", byte_level_metadata())
    data = path.read_bytes()
    first = min(tensor.offset for tensor in read_header(path).tensors.values())
    draw = random.Random(0)
    errors = []
    for _ in range(400):
        changed = bytearray(data)
        changed[draw.randrange(first)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            base = load_base(path)
            base.read_tokenizer()
        except ValueError as error:
            errors.append(str(error))
    assert errors and all(str(path) in error for error in errors)
