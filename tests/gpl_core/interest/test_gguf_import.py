"""A GGUF file becomes the checkpoint it was made from, and whatever cannot become one is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gpl_core.cli import main
from gpl_core.errors import ContractError, GplError, MissingInputError, UsageError
from gpl_core.interest.base_model import END_OF_TEXT, END_OF_TURN, TinySettings, load_base, make_tiny_checkpoint
from gpl_core.interest.gguf_import import import_gguf
from gpl_core.interest.interest_model import ModelSettings, build_interest_model
from tests.gpl_core.interest.conftest import SHAPES, each_family

# Every Qwen2 file has the first, and transformers adds it to a Qwen2 tokenizer that lacks it.
CONTROL = {"qwen2": END_OF_TEXT, "qwen3": END_OF_TURN, "llama": END_OF_TURN}


def write_gguf(
    file: Path, checkpoint: Path, shape: TinySettings, kind: gguf.GGMLQuantizationType | None = None, **changes: object
) -> Path:
    """``checkpoint`` as llama.cpp's converter writes it. ``changes``: keys of the file, or tensors of it, to replace;
    None leaves one out."""
    writer = gguf.GGUFWriter(file, str(changes.pop("general.architecture", shape.family)))
    letters = sorted(t for t in AutoTokenizer.from_pretrained(checkpoint).get_vocab() if len(t) == 1)
    tokens = [*letters, "Ġt", CONTROL[shape.family]]
    facts = {
        f"{shape.family}.context_length": shape.max_positions,
        f"{shape.family}.block_count": shape.layers,
        f"{shape.family}.embedding_length": shape.hidden,
        f"{shape.family}.feed_forward_length": shape.intermediate,
        f"{shape.family}.attention.head_count": shape.heads,
        f"{shape.family}.attention.head_count_kv": shape.kv_heads,
        f"{shape.family}.attention.key_length": shape.head_dim or shape.hidden // shape.heads,
        f"{shape.family}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{shape.family}.rope.freq_base": 10_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
        "tokenizer.ggml.merges": ["Ġ t"],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in (facts | {k: v for k, v in changes.items() if not k.endswith(".weight")}).items():
        if value is not None:
            add[type(value)](key, value)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == shape.family), shape.layers
    )
    tensors = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        values = weight.numpy()
        if shape.family == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = shape.heads if stem.endswith("q_proj") else shape.kv_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        tensors[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(values)
    for name, values in (tensors | {k: v for k, v in changes.items() if k.endswith(".weight")}).items():
        if values is None:
            continue
        if values.dtype == np.uint8:  # blocks of a kind that gguf cannot read
            writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.Q8_K)
        elif kind is not None and values.ndim == 2 and not values.shape[1] % 32:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def shape(family: str) -> TinySettings:
    return SHAPES[family]


@each_family
def test_a_file_becomes_the_checkpoint_it_was_made_from(family, shape, checkpoint, tmp_path, capsys) -> None:
    """Bit for bit, by the command; the folder is a base of the interest model."""
    file = write_gguf(tmp_path / "m.gguf", checkpoint, shape)
    assert main(["import-checkpoint", str(file), str(tmp_path / "new/folder")]) == 0
    assert "interest.base_model" in capsys.readouterr().out
    folder = tmp_path / "new/folder"
    assert {f.suffix for f in folder.iterdir()} <= {".json", ".safetensors"}
    ours, theirs = load_file(folder / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (model, tokenizer), (original, _) = (load_base(f, torch.float32, "sdpa") for f in (folder, checkpoint))
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)
    end = CONTROL[family]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(f"a t12{end}")) == ["a", "Ġt", "1", "2", end]
    assert tokenizer.eos_token == end
    assert build_interest_model(folder, ModelSettings(3, 8, lora_rank=4)).vocabulary.size == 24
    assert main(["import-checkpoint", str(file), str(folder)]) == 2
    assert f"{folder} already exists" in capsys.readouterr().err


def test_quantized_weights_are_what_the_blocks_say(checkpoint, tmp_path) -> None:
    kind = gguf.GGMLQuantizationType.Q4_1
    (tmp_path / "folder").mkdir()
    import_gguf(write_gguf(tmp_path / "m.gguf", checkpoint, SHAPES["qwen2"], kind), tmp_path / "folder")
    name = "model.layers.1.mlp.gate_proj.weight"
    original = load_file(checkpoint / "model.safetensors")[name]
    expected = gguf.dequantize(gguf.quantize(original.numpy(), kind), kind)
    found = load_file(tmp_path / "folder/model.safetensors")[name]
    assert torch.equal(found, torch.from_numpy(expected))
    assert not torch.equal(found, original)


@each_family
def test_what_a_file_may_leave_out_is_what_llama_cpp_takes_for_it(family, shape, checkpoint, tmp_path) -> None:
    """Not what transformers takes, which is another number in some families."""
    left_out = {f"{family}.{key}": None for key in ("attention.head_count_kv", "rope.freq_base")}
    full = replace(shape, kv_heads=shape.heads)
    make_tiny_checkpoint(tmp_path / "full", full)
    (tmp_path / "folder").mkdir()
    import_gguf(write_gguf(tmp_path / "m.gguf", tmp_path / "full", full, **left_out), tmp_path / "folder")
    ids = torch.arange(40)[None]
    model, original = (load_base(tmp_path / f, torch.float32, "sdpa")[0] for f in ("folder", "full"))
    assert model.config.num_key_value_heads == shape.heads
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"general.architecture": "gemma3"}, UsageError, "'gemma3', expected one of qwen2, qwen3, llama"),
        ({"qwen2.rope.scaling.type": "yarn"}, UsageError, "qwen2.rope.scaling.type = yarn"),
        ({"qwen2.rope.dimension_count": 4}, UsageError, "qwen2.rope.dimension_count = 4, expected 8"),
        ({"qwen2.attention.key_length": 16}, UsageError, "qwen2.attention.key_length = 16, expected 8"),
        ({"blk.1.ffn_up.weight": None}, UsageError, "lacks the tensors .*blk.1.ffn_up.weight"),
        ({"rope_freqs.weight": np.ones(4, np.float32)}, UsageError, "has besides .*rope_freqs.weight"),
        ({"blk.0.ffn_up.weight": np.ones((4, 4), np.float32)}, ContractError, r"\(4, 4\), expected \(48, 32\)"),
        ({"blk.0.ffn_up.weight": np.ones((48, 292), np.uint8)}, UsageError, "blk.0.ffn_up.weight: .*Q8_K.*not read"),
        ({"token_embd.weight": np.ones((99, 32), np.float32)}, ContractError, r"tokens, end of text \d+, 99 rows"),
        ({"tokenizer.ggml.model": "llama"}, UsageError, "tokenizer 'llama'"),
        ({"tokenizer.ggml.pre": "tekken"}, UsageError, "tokenizer 'gpt2', 'tekken'"),
        ({"qwen2.attention.layer_norm_rms_epsilon": None}, ContractError, "rms_epsilon' is absent.*not a whole model"),
        ({"tokenizer.ggml.eos_token_id": None}, ContractError, "eos_token_id.*not a whole model"),
        ({"tokenizer.ggml.eos_token_id": 999}, ContractError, "tokens, end of text 999"),
        ({"tokenizer.ggml.tokens": None}, ContractError, "0 tokens"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_and_nothing_is_written(
    checkpoint, tmp_path, changes: dict, error: type[GplError], said: str
) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoint, SHAPES["qwen2"], **changes)
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=said):
        import_gguf(file, tmp_path / "folder")
    assert not [*(tmp_path / "folder").iterdir()]


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:2_000]), ContractError),
        (lambda file: file.write_bytes(b"not a model"), ContractError),
        (Path.unlink, MissingInputError),
    ],
)
def test_a_damaged_file_is_refused(checkpoint, tmp_path, damage: Callable[[Path], object], error) -> None:
    file = write_gguf(tmp_path / "m.gguf", checkpoint, SHAPES["qwen2"])
    damage(file)
    with pytest.raises(error, match=r"m\.gguf"):
        import_gguf(file, tmp_path)
