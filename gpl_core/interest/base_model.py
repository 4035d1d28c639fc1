"""Base checkpoints: Qwen2, Qwen3 or Llama folders (config, safetensors, tokenizer), read from a local path only."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from gpl_core.errors import MissingInputError, UsageError

END_OF_TEXT = "<|endoftext|>"
END_OF_TURN = "<|im_end|>"
FAMILIES = ("qwen2", "qwen3", "llama")
"""The values of a configuration's model_type that are read; the tests compare each with the library's own forward."""


@dataclass(frozen=True)
class TinySettings:
    """Shape of a small model for the quickstart and tests; everything else as the family's configuration has it."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    max_positions: int = 1024
    vocabulary: int = 0  # embedding rows; 0: one per token of the tokenizer. Real checkpoints have spare rows.
    seed: int = 0
    family: str = "qwen2"  # one of FAMILIES
    head_dim: int = 0  # 0: hidden / heads


def make_tiny_checkpoint(folder: str | Path, settings: TinySettings) -> None:
    """Write a checkpoint with random weights to ``folder``; same settings, same bytes.

    The tokenizer is byte-level BPE without merges: any text can be encoded, nothing is downloaded.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, additional_special_tokens=[END_OF_TURN]
    )
    config = AutoConfig.for_model(
        settings.family,
        vocab_size=max(len(tokenizer), settings.vocabulary),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.head_dim or settings.hidden // settings.heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = AutoModelForCausalLM.from_config(config)
    # Not save_pretrained: on any rank but 0 of a process group it writes nothing, and every machine needs the files.
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(Path(folder) / "config.json")
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)


def load_base(folder: str | Path, dtype: torch.dtype, attention: str) -> tuple[Any, Any]:
    """The model (safetensors only, no remote code, no network) and tokenizer of the checkpoint at ``folder``.

    Raises MissingInputError where files are absent, UsageError on another architecture or sliding-window attention.
    """
    path = Path(folder)
    _files(path)
    config_file = path / "config.json"
    raw = json.loads(config_file.read_text())
    if raw.get("model_type") not in FAMILIES:
        raise UsageError(
            f"checkpoint: model_type {raw.get('model_type')!r} in {config_file}, expected one of {', '.join(FAMILIES)}."
        )
    if raw.get("use_sliding_window") or set(raw.get("layer_types") or ()) - {"full_attention"}:
        raise UsageError(f"checkpoint: sliding windows in {config_file}; expected full attention in every layer.")
    disable_progress_bar()  # one bar per shard on every rank
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        attn_implementation=attention,
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    return model, tokenizer


def base_fingerprint(folder: str | Path) -> str:
    """SHA-256 over the weights, config and tokenizer files of a checkpoint: what an adapter was trained on."""
    digest = hashlib.sha256()
    for file in _files(Path(folder)):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    """The files that decide what a checkpoint computes; MissingInputError where one is absent."""
    weights = list(folder.glob("*.safetensors")) or [folder / "*.safetensors"]
    files = sorted([folder / "config.json", folder / "tokenizer.json", *weights])
    if absent := [file.name for file in files if not file.is_file()]:
        raise MissingInputError(
            f"checkpoint: {folder} has no {', '.join(absent)}, expected a checkpoint folder; download it there first "
            "(pickled weights are not read)."
        )
    return files
