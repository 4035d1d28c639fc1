"""Petastorm -> PyTorch: batches of tensors from one pinned slice of the feed.

python docs/examples/petastorm_pytorch.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import json
import sys
import warnings
from pathlib import Path

from petastorm import make_batch_reader
from petastorm.pytorch import BatchedDataLoader

COLUMNS = ["item_index", "is_exposed", "target", "label", "pseudo_label", "sample_weight"]


def batches(manifest: dict, size: int = 256):
    """Dicts of tensors; the files are the manifest's, so a later version of the table changes nothing."""
    place = manifest["location"] if "://" in manifest["location"] else f"file://{manifest['location']}"
    urls = [f"{place}/{f['path']}" for f in manifest["files"]]
    reader = make_batch_reader(urls, schema_fields=COLUMNS, num_epochs=1, reader_pool_type="thread", workers_count=1)
    with BatchedDataLoader(reader, batch_size=size) as loader:
        yield from loader


def totals(manifest: dict) -> dict:
    """Rows and sums, to compare with the manifest before anything is trained."""
    found = {"rows": 0, "label_sum": 0.0, "pseudo_label_sum": 0.0, "weight_sum": 0.0}
    for batch in batches(manifest):
        # loss = dual_label_loss(model(batch), batch["target"], batch["is_exposed"].bool(), batch["sample_weight"], 2.0)
        found["rows"] += len(batch["target"])
        for name in ("label", "pseudo_label"):
            found[f"{name}_sum"] += batch[name].double().sum().item()
        found["weight_sum"] += batch["sample_weight"].double().sum().item()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    print(totals(json.loads(Path(sys.argv[1]).read_text())))
