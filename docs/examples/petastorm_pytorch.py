"""Petastorm -> PyTorch: batches of tensors from one pinned slice of the feed, on a disk or at s3://….
python docs/examples/petastorm_pytorch.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import json
import sys
import warnings

from petastorm import make_batch_reader
from petastorm.pytorch import BatchedDataLoader
from pyarrow.filesystem import S3FSWrapper  # the old kind, all that Petastorm 0.12 takes; it wraps any of fsspec's

from gpl_core.lakehouse.storage import filesystem

COLUMNS = ["item_index", "is_exposed", "target", "label", "pseudo_label", "sample_weight"]


def batches(manifest: dict, size: int = 256):
    """Dicts of tensors; the files are the manifest's, so a later version of the table changes nothing."""
    fs, base = filesystem(manifest["location"])
    urls = [fs.unstrip_protocol(f"{base}/{f['path']}") for f in manifest["files"]]
    reader = make_batch_reader(urls, COLUMNS, "thread", workers_count=1, num_epochs=1, filesystem=S3FSWrapper(fs))
    with BatchedDataLoader(reader, batch_size=size) as loader:
        yield from loader


def totals(manifest: dict) -> dict:
    """Rows and sums, to compare with the manifest before anything is trained."""
    found = {"rows": 0, "label_sum": 0.0, "pseudo_label_sum": 0.0, "weight_sum": 0.0}
    for batch in batches(manifest):
        # loss = dual_label_loss(model(batch), batch["target"], batch["is_exposed"].bool(), batch["sample_weight"], 2.0)
        found["rows"] += len(batch["target"])
        for name in ("label", "pseudo_label", "sample_weight"):
            found[f"{name.removeprefix('sample_')}_sum"] += batch[name].double().sum().item()
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    print(totals(json.loads(filesystem(sys.argv[1])[0].cat_file(sys.argv[1]))))
