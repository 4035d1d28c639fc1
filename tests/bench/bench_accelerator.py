"""What one accelerator does, in fp32 and in bf16: the search, training with LoRA, and the scores of pairs.

For a machine that has this checkout and torch, transformers and peft, and nothing else of the project's requirements.
Qwen2.5-0.5B's shape with random weights, L = 3, C = 256 (`--quick`: 4 of its 24 layers, fewer users). Search: prompts
of 300 tokens, 50 beams; the floor is one packed prefill of as many positions (bench_search). Training: one epoch over
histories of 20 events by AdamW, on weights of the type itself (under DeepSpeed the worker keeps fp32 copies of those
that learn). Whether both types find the same anchors is measured on random weights, whose logits are scaled to lie
about as far apart as trained ones; near-ties are many all the same.

    python -m tests.bench.bench_accelerator [--quick]
"""

from __future__ import annotations

import statistics
import tempfile

import torch

from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.interest_model import ModelSettings, build_interest_model
from gpl_core.labels.pair_scoring import PairBlock, score_block
from tests.bench import bench_interest_training, bench_score_candidates, bench_search
from tests.bench.harness import (
    Figure,
    at_least,
    at_most,
    clock,
    device,
    device_name,
    interleaved,
    is_quick,
    median_ratio,
    report,
)

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT, BEAMS = 300, 50
SPREAD = 4.0  # trained logits lie about this much further apart than the model's start


def search(users: int, repeats: int, quick: bool) -> dict[str, Figure]:
    """Users per second, time over the floor, and how many of fp32's ten likeliest anchors bf16 finds."""
    bench = bench_search.make_bench(quick)
    with torch.no_grad():
        bench.model.scale *= SPREAD
    figures, best = {}, {}
    for name, kind in TYPES.items():
        bench.model.to(kind)
        ours = bench.ours(users, PROMPT, BEAMS)
        seconds = interleaved({"ours": ours, "floor": bench.floor(users, PROMPT, BEAMS)}, repeats, clock())
        rate = users / statistics.median(seconds["ours"])
        ratio = median_ratio(seconds["ours"], seconds["floor"])
        judged = name == "bf16" and device().type == "cuda"
        figures[f"search, {name}: users per second"] = (
            at_least(rate, 1_500, "users/s") if judged else Figure(rate, "users/s")
        )
        figures[f"search, {name}: time over the floor"] = at_most(ratio, 1.3, "x") if judged else Figure(ratio, "x")
        best[name] = ours().sids[:, :10]
    same = (best["fp32"][:, :, None] == best["bf16"][:, None]).all(axis=3).any(axis=2)
    return figures | {"search: top 10 in bf16 as in fp32": at_least(float(same.mean()), 0.95, "share")}


def training(users: int, budget: int, layers: int) -> dict[str, Figure]:
    """Tokens per second of an epoch, after one that is not measured; on a GPU the peak of its memory."""
    figures = {}
    histories, sids = bench_interest_training.make_histories("equal", users)
    settings = ModelSettings(3, 256, content_width=bench_interest_training.WIDTH)
    for name, kind in TYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            make_tiny_checkpoint(folder, TinySettings(896, layers, 14, 2, 4864, 4096, vocabulary=151_936))
            model = build_interest_model(folder, settings).train().to(device(), kind)
        if device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        epoch = bench_interest_training.train_ours(model, histories, sids, budget)
        seconds = interleaved({"epoch": epoch}, 1, clock())["epoch"][0]
        figures[f"training, {name}: tokens per second"] = Figure(users * 20 * 3 / seconds, "tokens/s")
        if device().type == "cuda":
            figures[f"training, {name}: peak memory"] = Figure(torch.cuda.max_memory_allocated() / 2**30, "GiB")
    return figures


def scores(users: int, items: int, repeats: int) -> dict[str, Figure]:
    """Pairs per second of `score_block`, with item vectors of both types."""
    *block, vectors = (x.to(device()) for x in bench_score_candidates.make_block(users, items))
    figures = {}
    for name, kind in TYPES.items():
        table = vectors.to(kind)
        job = {"ours": lambda table=table: score_block(PairBlock(*block), table, 3)}
        seconds = statistics.median(interleaved(job, repeats, clock())["ours"])
        pairs = users * bench_score_candidates.B
        figures[f"scores, vectors in {name}: pairs per second"] = Figure(pairs / seconds, "pairs/s")
    return figures


def main() -> None:
    """Measure, print, write."""
    quick, on_gpu = is_quick(), device().type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    users, layers = (512, 24) if on_gpu and not quick else (32, 4) if on_gpu else (4, 4 if quick else 24)
    figures = search(users, 10 if on_gpu else 3, quick)
    figures |= training(2 * users, 16_384 if on_gpu else 600, layers)
    figures |= scores(8 * users, 1_000_000 if on_gpu and not quick else 20_000, 10)
    title = (
        f"Qwen2.5-0.5B's shape, {layers} layers; search of {users} users at P {PROMPT}, K {BEAMS}; {device_name()}, "
        f"torch {torch.__version__}"
    )
    report("accelerator", figures, quick, title)


if __name__ == "__main__":
    main()
