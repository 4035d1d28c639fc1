"""Training the interest model: ours against Hugging Face's Trainer, same weights, same LoRA, same users.

Qwen2.5-0.5B's shape and vocabulary (151,936 + SIDs; `--quick`: 2 of its 24 layers), L = 3, C = 256. Ours as it ships:
content read and scored (384 wide), packed sequences, no pad tokens, loss over the valid SIDs. The Trainer has the SIDs
alone: users sorted by length (its `group_by_length` sorts a few batches at a time), batches padded to their longest
user, loss over the whole vocabulary, the SID rows trained through PEFT's own forward. It gets up to four settings: as
many users a batch as make a pack of ours at the longest or at the mean length, with and without its gradient
checkpointing. The fastest of them is what ours is compared with, in speed and in memory; memory also with the leanest.
Equal lengths (20 events each), and the lengths of the shared Industrial data where it is present (2 to 20 events).
Each side runs in a process of its own, because peak memory is a process's; it is counted from when the model stands, as
making and loading it are no part of training. Speed is tokens of real events per second.
Ours computes elementwise operations again in the backward pass (`interest.recompute: elementwise`, as
docs/own-tables.md shows for a cluster).

On a CPU one thread's CPU time is measured: about 25 minutes in all and 12 GiB, `--quick` about 3 minutes and 5 GiB.
On Linux all sides' malloc gives freed blocks back at once and asks for huge pages, so that the peak of the resident
set is what is in use (as an accelerator's peak is), not what malloc holds back: with its defaults 2 to 3 GiB.

    python -m tests.bench.bench_interest_training [--quick]
"""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.packing import UserHistory, training_packs
from gpl_core.interest.training import target_log_probs
from tests.bench.bench_search import with_content
from tests.bench.harness import Figure, at_least, at_most, device, device_name, is_quick, report
from tests.gpl_core.interest.oracle import interest_loss

LEVELS, CODES, ITEMS, MOST_EVENTS, WIDTH = 3, 256, 4_000, 20, 384
OURS = "ours"
SHARED = Path(os.environ.get("GPL_SHARED_DATA", "../shared/data")) / "amazon_industrial" / "sequences.jsonl.gz"


def lengths_of(kind: str, users: int) -> np.ndarray:
    """Events per user: all MOST_EVENTS, or as in the Industrial data (2 .. MOST_EVENTS)."""
    if kind == "equal":
        return np.full(users, MOST_EVENTS)
    with gzip.open(SHARED, "rt") as lines:
        real = np.array([len(json.loads(line)["events"]) for line in lines])
    real = np.minimum(real[real > 1], MOST_EVENTS)
    return np.random.default_rng(0).choice(real, users)


def make_histories(kind: str, users: int) -> tuple[list[UserHistory], np.ndarray]:
    """The same users for all sides, and the catalog's SIDs."""
    rng = np.random.default_rng(1)
    sids = rng.integers(0, CODES, (ITEMS, LEVELS))
    items = [rng.integers(0, ITEMS, n) for n in lengths_of(kind, users)]
    return [UserHistory(sids[i], np.ones(len(i), dtype=bool), i) for i in items], sids


def train_ours(model: InterestModel, histories: list[UserHistory], sids: np.ndarray, budget: int) -> Callable[[], None]:
    """One epoch over ``histories`` in packs of ``budget`` tokens."""
    trie, content = with_content(sids, WIDTH, np.random.default_rng(2), model.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    model.recompute("elementwise")

    def epoch() -> None:
        for pack in training_packs(model.vocabulary, histories, MOST_EVENTS, budget):
            interest_loss(target_log_probs(model, trie, pack, content)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def trainers(kind: str, users: int, budget: int) -> dict[str, tuple[int, bool]]:
    """The Trainer's settings by name: users a batch, and whether it checkpoints gradients."""
    lengths = lengths_of(kind, users)
    batches = sorted({int(budget // (length * LEVELS)) for length in (lengths.max(), lengths.mean())})
    return {
        f"Trainer, {batch} users a batch{', checkpointing' * checkpointing}": (batch, checkpointing)
        for batch in batches
        for checkpointing in (False, True)
    }


def train_trainer(
    model: InterestModel, histories: list[UserHistory], batch_size: int, checkpointing: bool
) -> Callable[[], None]:
    """The same epoch by the Trainer: sorted by length, padded, full vocabulary."""
    from transformers import Trainer, TrainingArguments

    vocabulary = model.vocabulary
    body = model.body
    body.get_base_model().set_attn_implementation("sdpa")
    if checkpointing:
        body.enable_input_require_grads()  # the embedding of a frozen base asks for none
    longest_first = sorted(histories, key=lambda h: -len(h.sids))
    rows = [{"input_ids": vocabulary.ids(h.sids).ravel().tolist()} for h in longest_first]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)  # no SID has id 0
        for line, row in enumerate(batch):
            ids[line, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        real = ids != 0
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, -100)}

    folder = tempfile.mkdtemp()
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=folder, num_train_epochs=1, per_device_train_batch_size=batch_size,
        activation_checkpointing=checkpointing, activation_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential", learning_rate=1e-4, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return lambda: Trainer(model=body, args=arguments, train_dataset=rows, data_collator=collate).train()


def measure(
    trainer: tuple[int, bool] | None, kind: str, layers: int, users: int, budget: int, answer: multiprocessing.Queue
) -> None:
    """One side in this process: seconds (CPU time of one thread, or wall clock on a GPU) and peak bytes.

    ``trainer``: the users of its batch, and whether it checkpoints; None: ours.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    histories, sids = make_histories(kind, users)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_checkpoint(folder, TinySettings(896, layers, 14, 2, 4864, 4096, vocabulary=151_936))
        settings = ModelSettings(LEVELS, CODES, content_width=0 if trainer else WIDTH)
        model = build_interest_model(folder, settings).train()
    if on_gpu:
        model = model.to("cuda", torch.bfloat16)
    job = train_trainer(model, histories, *trainer) if trainer else train_ours(model, histories, sids, budget)
    if not on_gpu:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of the resident set is reset
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    job()
    if on_gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        status = Path("/proc/self/status").read_text()
        peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    answer.put((clock() - start, peak, sum(len(h.sids) for h in histories) * LEVELS))


def main() -> None:
    """Measure, print, write."""
    quick, on_gpu = is_quick(), device().type == "cuda"
    layers, users, budget = (2, 32, 1_200) if quick else (24, 512, 4_800) if on_gpu else (24, 128, 1_200)
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4194304"  # read by new processes
    figures: dict[str, Figure] = {}
    for kind, goal in (("equal", 1.4), ("Industrial", 1.8)):
        if kind == "Industrial" and not SHARED.is_file():
            print(f"left out: lengths of the Industrial data, {SHARED} is absent")
            continue
        found = {}
        for side, trainer in {OURS: None, **trainers(kind, users, budget)}.items():
            context = multiprocessing.get_context("spawn")
            answer = context.Queue()
            process = context.Process(target=measure, args=(trainer, kind, layers, users, budget, answer))
            process.start()
            process.join()
            if process.exitcode == -signal.SIGKILL and trainer:
                print(f"{kind}, {side}: left out, killed, as a machine does that lacks memory", flush=True)
                continue
            if process.exitcode:
                raise SystemExit(f"{side} failed with exit code {process.exitcode}")
            seconds, peak, tokens = answer.get()
            found[side] = (tokens / seconds, peak)
            print(f"{kind}, {side}: {seconds:.0f} s, {peak / 2**30:.1f} GiB", flush=True)
            figures[f"{kind} lengths: {side}, tokens per second"] = Figure(tokens / seconds, "tokens/s")
            figures[f"{kind} lengths: {side}, peak memory"] = Figure(peak / 2**30, "GiB")
        ours = found.pop(OURS)
        fastest, memory = max(found.values())
        leanest = min(peak for _, peak in found.values())
        figures[f"{kind} lengths: speed over the fastest Trainer"] = at_least(ours[0] / fastest, goal, "x")
        figures[f"{kind} lengths: share of its memory"] = at_most(ours[1] / memory, 0.5, "ratio")
        figures[f"{kind} lengths: share of the leanest Trainer's memory"] = Figure(ours[1] / leanest, "ratio")
    title = (
        f"training at Qwen2.5-0.5B's shape, {layers} layers, {users} users, {budget} tokens a batch, {device_name()}"
    )
    report("interest_training", figures, quick, title)


if __name__ == "__main__":
    main()
