"""pyarrow + PyTorch without Petastorm: an IterableDataset over the pinned files, split over loader workers.
python docs/examples/pyarrow_pytorch.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

COLUMNS = ["item_index", "is_exposed", "target", "label", "pseudo_label", "sample_weight"]


class Feed(IterableDataset):
    """Batches of one slice; each loader worker reads its own files."""

    def __init__(self, manifest: dict, size: int = 256):
        self.files = [f"{manifest['location']}/{f['path']}" for f in manifest["files"]]
        self.size = size

    def __iter__(self):
        info = get_worker_info()
        for path in self.files[info.id :: info.num_workers] if info else self.files:
            for rows in pq.ParquetFile(path).iter_batches(self.size, columns=COLUMNS):
                yield {n: torch.tensor(rows[n].to_numpy(zero_copy_only=False)) for n in COLUMNS}


def totals(manifest: dict) -> dict:
    """Rows and sums, to compare with the manifest before anything is trained."""
    rows, sums = 0, {"label": 0.0, "pseudo_label": 0.0, "sample_weight": 0.0}
    for batch in DataLoader(Feed(manifest), batch_size=None):
        rows += len(batch["target"])
        sums = {n: total + batch[n].double().sum().item() for n, total in sums.items()}
    return {"rows": rows, "weight_sum": sums.pop("sample_weight"), **{f"{n}_sum": v for n, v in sums.items()}}


if __name__ == "__main__":
    print(totals(json.loads(Path(sys.argv[1]).read_text())))
