"""A GGUF file as a checkpoint folder: config.json, model.safetensors (dequantized, float32) and tokenizer.json.

Any key, tensor or tokenizer that is not known here is refused, because ignoring it would change the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gpl_core.errors import ContractError, MissingInputError, UsageError
from gpl_core.interest.base_model import FAMILIES

_KEYS: Mapping[str, str | None] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": None,
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.dimension_count": None,
    "rope.freq_base": "rope_theta",
    "vocab_size": None,  # the embedding's rows say it
}
"""What a file says of its architecture -> the setting in config.json; None: must agree with the others."""
_SPLITS = ("qwen2", "llama-bpe", "gpt-2", "smollm")  # how a byte-level BPE tokenizer cuts text before merging


def import_gguf(file: str | Path, folder: str | Path) -> None:
    """Write the model in ``file`` to ``folder``, which exists and is empty.

    Raises MissingInputError without the file or the package gguf, ContractError on a damaged file, UsageError on one
    that holds something else than a plain Qwen2, Qwen3 or Llama model with a byte-level tokenizer.
    """
    try:
        import gguf
    except ImportError:
        raise MissingInputError("gguf: the package is not installed; install the extra gguf.") from None
    if not Path(file).is_file():
        raise MissingInputError(f"{file}: no such file; give a GGUF file.")
    try:
        reader = gguf.GGUFReader(file)
        facts = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (ValueError, IndexError, KeyError) as error:
        raise ContractError(f"{file}: cannot be read as GGUF ({error}); fetch it again.") from None
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file, facts, tensors)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures, wanted = [type(model).__name__], model.state_dict()
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    theirs = {f"{names.get_name(stem)}.{end}": f"{stem}.{end}" for stem, end in (n.rsplit(".", 1) for n in wanted)}
    missing, unknown = sorted(theirs.keys() - tensors.keys()), sorted(tensors.keys() - theirs.keys())
    if missing or unknown:
        raise UsageError(
            f"{file}: as a {config.model_type} model it lacks the tensors {missing[:3] or 'none'} and has besides "
            f"{unknown[:3] or 'none'} ({len(missing)} and {len(unknown)} in all); such a model is not read."
        )
    weights = {}
    for name, ours in theirs.items():
        try:
            values = gguf.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32)
        except NotImplementedError as error:
            raise UsageError(f"{file}: {name}: {error}; such a model is not read.") from None
        if config.model_type == "llama" and ours.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in ours else config.num_key_value_heads
            # Rows of a head are interleaved pairs, as llama.cpp rotates them: back to two halves.
            values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if values.shape != tuple(wanted[ours].shape):
            raise ContractError(f"{file}: {name} has shape {values.shape}, expected {tuple(wanted[ours].shape)}.")
        weights[ours] = torch.from_numpy(np.ascontiguousarray(values))
    tokenizer = _tokenizer(file, facts, config.vocab_size)
    tokenizer.save_pretrained(folder)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config.to_json_file(Path(folder) / "config.json")


def _config(file: str | Path, facts: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    family = facts.get("general.architecture")
    if family not in FAMILIES:
        raise UsageError(f"{file}: general.architecture {family!r}, expected one of {', '.join(FAMILIES)}.")
    said = {key.removeprefix(f"{family}."): value for key, value in facts.items() if key.startswith(f"{family}.")}
    if unknown := sorted(said.keys() - _KEYS.keys()):
        raise UsageError(f"{file}: {family}.{unknown[0]} = {said[unknown[0]]}: such a model is not read.")
    try:
        heads = said["attention.head_count"]
        width = said["embedding_length"] // heads
        # What llama.cpp takes for a key that is not there; the library's own defaults are other ones.
        defaults = {"attention.head_count_kv": heads, "attention.key_length": width, "rope.freq_base": 10_000.0}
        settings = {ours: {**defaults, **said}[key] for key, ours in _KEYS.items() if ours}
        config = AutoConfig.for_model(
            family,
            **settings,
            vocab_size=int(tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in tensors,
            eos_token_id=facts["tokenizer.ggml.eos_token_id"],
            bos_token_id=None,
            pad_token_id=None,
        )
    except (KeyError, TypeError) as error:
        raise ContractError(f"{file}: {error} is absent or of another type; it is not a whole model.") from None
    same = {"attention.value_length": config.head_dim, "rope.dimension_count": config.head_dim}
    if family == "qwen2":
        same["attention.key_length"] = width  # Qwen2 has no width of its own
    for key, expected in same.items():
        if said.get(key, expected) != expected:
            raise UsageError(f"{file}: {family}.{key} = {said[key]}, expected {expected}: such a model is not read.")
    return config


def _tokenizer(file: str | Path, facts: Mapping[str, Any], rows: int) -> Any:
    kind, split = facts.get("tokenizer.ggml.model"), facts.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise UsageError(f"{file}: tokenizer {kind!r}, {split!r}; expected 'gpt2' with one of {', '.join(_SPLITS)}.")
    path = Path(file)
    tokens, eos = facts.get("tokenizer.ggml.tokens", ()), facts["tokenizer.ggml.eos_token_id"]
    if not 0 <= eos < len(tokens) <= rows:
        raise ContractError(f"{file}: {len(tokens)} tokens, end of text {eos}, {rows} rows in token_embd.weight.")
    read = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    core = json.loads(read.backend_tokenizer.to_str())
    # GPT-2's own end of text, where the file has none: the model has no row for it.
    core["added_tokens"] = [token for token in core["added_tokens"] if token["id"] < len(tokens)]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token=tokens[eos])
    if split == "smollm":  # transformers does not know it: digits stand alone
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer
