"""The interest model: a frozen language model with LoRA, or a small one trained whole, and rows for the SID tokens.

Legend for shapes: T packed tokens, L levels, C codes per level, D hidden width.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from gpl_core.errors import ContractError, UsageError
from gpl_core.interest.attention import ATTENTION, AttentionPlan
from gpl_core.interest.base_model import load_base
from gpl_core.interest.content import ContentHeads
from gpl_core.interest.vocabulary import SidVocabulary, extend_tokenizer

_ADAPTER = "default"
_START_SPREAD = 0.25  # of a level's logits before training: near enough to uniform, and not flat


@dataclass(frozen=True)
class ModelSettings:
    """What is put on top of a base checkpoint."""

    levels: int  # L of the tokenizer artifact
    codes: int  # C of the tokenizer artifact
    lora_rank: int = 16  # 0: the whole body is trained, for one that is not pre-trained
    lora_alpha: int = 32
    dropout: float = 0.0  # before LoRA's matrices; in a body that is trained whole, at its input and after each block
    seed: int = 0  # of new weights
    content_width: int = 0  # d of the item vectors that are read and scored; 0: SIDs alone


class InterestModel(nn.Module):
    """Predicts a user's next SID from the SIDs of the history; made by `build_interest_model`.

    The language model's own head (all the base's words) is never computed: the logits of a level are hidden states
    times its C output rows. Input vectors of SID tokens are read from the trained rows directly, because PEFT's forward
    would copy the whole embedding matrix in every step.
    """

    def __init__(self, body: PeftModel, tokenizer: Any, vocabulary: SidVocabulary, settings: ModelSettings) -> None:
        super().__init__()
        self.body = body
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self.settings = settings
        # Whatever the norms of the base are: a last hidden state is as long as the weight of its norm, and
        # rows lie in random directions.
        head = self._backbone.embed_tokens if self.config.tie_word_embeddings else self._base.lm_head
        spread = _spread(head.token_adapter.get_base_layer().weight.detach()[: vocabulary.first_id])
        length = float(self._backbone.norm.weight.detach().float().norm())
        most = max(length * spread, 1e-12)  # product of a state with a row
        start = _START_SPREAD * self.config.hidden_size**0.5 / most
        self.scale = nn.Parameter(torch.full((settings.levels,), start))
        """Of the logits of a level's codes, [L]."""
        self.content: ContentHeads | None = None
        if settings.content_width:
            width, hidden = settings.content_width, self.config.hidden_size
            # A state that is nothing but an item's content asks for that content with 1 nat, beside what the item asks
            # for by itself: little where vectors are nearly orthogonal.
            words = self._backbone.embed_tokens.token_adapter.get_base_layer().weight.detach()
            read = _spread(words[: vocabulary.first_id])  # added to inputs, whose rows may differ from the head's
            share = 1.0 / max(length * read, 1e-12)
            self.content = ContentHeads(width, hidden, spread=read, share=share, seed=settings.seed)
        self.dropout = nn.Dropout(0.0 if settings.lora_rank else settings.dropout)
        if not settings.lora_rank:
            self._backbone.layers.requires_grad_(True)
            self._backbone.norm.requires_grad_(True)
            for layer in self._backbone.layers:
                for block in (layer.self_attn.o_proj, layer.mlp.down_proj):
                    block.register_forward_hook(lambda _, __, out: self.dropout(out))
        self.to(self.input_rows.dtype)

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self._base.config

    @property
    def device(self) -> torch.device:
        """Where the trained rows are."""
        return self.input_rows.device

    @property
    def input_rows(self) -> nn.Parameter:
        """The trained embedding rows of the SID tokens, [L * C x D], level after level."""
        return self._backbone.embed_tokens.token_adapter.trainable_tokens_delta[_ADAPTER]

    @property
    def output_rows(self) -> Tensor:
        """The rows that give the logits, [L * C x D]: the input rows themselves where the base ties them."""
        if self.config.tie_word_embeddings:
            return self.input_rows
        return self._base.lm_head.token_adapter.trainable_tokens_delta[_ADAPTER]

    def level_rows(self, level: int) -> Tensor:
        """Output rows of the 0-based ``level``, [C x D]."""
        codes = self.vocabulary.codes
        return self.output_rows[level * codes : (level + 1) * codes]

    def embed(self, token_ids: Tensor) -> Tensor:
        """Input vectors of ``token_ids`` (int64 [T]), [T x D]."""
        first, size = self.vocabulary.first_id, self.vocabulary.size
        is_sid = (token_ids >= first) & (token_ids < first + size)
        base = self._backbone.embed_tokens.token_adapter.get_base_layer()
        words = nn.functional.embedding(torch.where(is_sid, 0, token_ids), base.weight.detach())
        sids = nn.functional.embedding((token_ids - first).clamp(0, size - 1), self.input_rows)
        return torch.where(is_sid[:, None], sids, words.to(sids.dtype))

    def hidden(
        self, token_ids: Tensor, positions: Tensor, plan: AttentionPlan, content: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Last hidden states [T x D] of packed ``token_ids`` and ``positions`` (int64 [T]) under ``plan``.

        ``content``: (places int64 [M], vectors [M x d]), item vectors that are projected and added at these places.
        """
        inputs = self.embed(token_ids)
        if self.content is not None and content is not None and len(content[0]):
            places, vectors = content
            inputs = inputs.index_add(0, places, self.content.read(vectors.to(inputs.dtype)))
        out = self._backbone(
            inputs_embeds=self.dropout(inputs)[None],
            position_ids=positions[None],
            attention_mask=None,  # the plan decides; for an attention of ours the library makes no mask
            use_cache=False,
            plan=plan,
        )
        return out.last_hidden_state[0]

    def recompute(self, what: Literal["elementwise", "layers"]) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, same gradients.

        ``elementwise``: all but attention and the products with the base's matrices, which saves most of the memory for
        little time. ``layers``: whole layers, keeping only their inputs, for about a third more time.
        """
        how: dict[str, Any] = {"use_reentrant": False}
        if what == "elementwise":
            policy = partial(_keep_costly, self.settings.lora_rank)
            how["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
        self._base.activation_checkpointing_enable(how)

    def merge(self) -> None:
        """Fold LoRA into the linear layers for inference: same function up to rounding, fewer kernels."""
        self.body.merge_adapter()

    @property
    def _backbone(self) -> Any:
        return self._base.model

    @property
    def _base(self) -> Any:
        return self.body.get_base_model()


def _spread(rows: Tensor) -> float:
    """How far a base's rows [V x D] lie from their mean, in the square mean; codebook rows do too."""
    rows = rows.float()
    return float((rows.norm(dim=1).square().mean() - rows.mean(0).norm().square()).sqrt())


def _keep_costly(rank: int, _: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """`elementwise` keeps attention, and matrix products whose inner width exceeds LoRA's ``rank``."""
    name = operation.name()
    product = name in ("aten::mm", "aten::addmm") and args[-1].shape[0] > rank
    if product or "scaled_dot_product" in name:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def build_interest_model(
    checkpoint: str | Path,
    settings: ModelSettings,
    codebooks: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
) -> InterestModel:
    """The untrained interest model on the base at ``checkpoint``; same arguments, same weights.

    ``codebooks`` float [L x C x k]: where the new rows start from (see `initial_rows`); None: from the mean row.
    """
    base: Any
    base, tokenizer = load_base(checkpoint, dtype, ATTENTION)
    known = len(tokenizer)
    if known > base.config.vocab_size:
        raise UsageError(
            f"checkpoint: the tokenizer at {checkpoint} has {known} tokens, the model {base.config.vocab_size} rows; "
            "they come from different checkpoints."
        )
    vocabulary = extend_tokenizer(tokenizer, settings.levels, settings.codes)
    old_rows = base.get_input_embeddings().weight.detach()
    last = vocabulary.first_id + vocabulary.size
    if last > len(old_rows):
        # mean_resizing would fit a covariance of the whole matrix for rows that are overwritten below.
        base.resize_token_embeddings(last, mean_resizing=False)
    targets = {"embed_tokens": vocabulary.token_indices}
    heads = [base.get_input_embeddings()]
    if not base.config.tie_word_embeddings:
        targets["lm_head"] = vocabulary.token_indices
        heads.append(base.get_output_embeddings())
    with torch.no_grad():
        for head in heads:
            head.weight[vocabulary.first_id : last] = initial_rows(
                head.weight[: min(known, vocabulary.first_id)], vocabulary, codebooks, settings.seed
            ).to(dtype)
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank or 1,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.lora_rank else DUMMY_TARGET_MODULES,
        trainable_token_indices=targets,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT still asks transformers by a name that v6 will drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(settings.seed)
        body = get_peft_model(base, adapter, adapter_name=_ADAPTER)
    return InterestModel(body, tokenizer, vocabulary, settings)


def initial_rows(existing: Tensor, vocabulary: SidVocabulary, codebooks: np.ndarray | None, seed: int) -> Tensor:
    """Initial SID rows, float32 [L * C x D] (ours).

    ``existing`` [V x D]: the base's rows. With ``codebooks`` [L x C x k]: each level's vectors, centered, through a
    random projection fixed by ``seed``, scaled so that the rows lie as far from the base's mean row as its own rows do
    on average. Without: the mean row plus a little noise, so that codes do not all start with the same logit.
    """
    rows = existing.detach().float().cpu()
    mean = rows.mean(0)
    spread = (rows - mean).norm(dim=1).mean()
    random = torch.Generator().manual_seed(seed)
    if codebooks is None:
        noise = torch.randn(vocabulary.size, rows.shape[1], generator=random)
        return mean + noise * (0.1 * spread / rows.shape[1] ** 0.5)
    parts = []
    for level in torch.from_numpy(np.array(codebooks, dtype=np.float32)):
        centered = level - level.mean(0)
        # One projection per level: codes of different levels must not look alike.
        projected = centered @ torch.randn(level.shape[1], rows.shape[1], generator=random)
        parts.append(projected * (spread / projected.norm(dim=1).mean().clamp_min(1e-12)))
    return mean + torch.cat(parts)


def adapter_state(model: InterestModel) -> dict[str, Tensor]:
    """What training changes, by name: LoRA's matrices or the body, SID rows, scales, content heads."""
    return {name: p.detach().cpu().contiguous().clone() for name, p in _trained(model).items()}


def load_adapter_state(model: InterestModel, state: dict[str, Tensor]) -> None:
    """Put `adapter_state` back into a model of the same base and settings; ContractError where it does not fit."""
    trained = _trained(model)
    have, wanted = ({name: tuple(value.shape) for name, value in of.items()} for of in (state, trained))
    if wrong := sorted(n for n in have.keys() | wanted.keys() if have.get(n) != wanted.get(n)):
        raise ContractError(
            f"adapter: {len(wrong)} tensors do not fit this base and settings, first {wrong[0]}: shape "
            f"{have.get(wrong[0])}, expected {wanted.get(wrong[0])}; load it on the base it was trained on."
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])


def _trained(model: InterestModel) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
