"""TorchEasyRec: the data_config of one pinned slice, after its reader's rules were checked on the files.

python docs/examples/torcheasyrec_config.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import glob
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CONFIG = """train_input_path: "{paths}"
data_config {{ batch_size: 4096 dataset_type: ParquetDataset fg_mode: FG_NONE num_workers: 1
  label_fields: "target" sample_weight_fields: "sample_weight" }}"""


def paths(manifest: dict) -> str:
    """Its input path: globs joined by commas; each must match just the one file."""
    files = [f"{manifest['location']}/{f['path']}" for f in manifest["files"]]
    assert all(glob.glob(f) == [f] and "," not in f for f in files), "a path that a glob or a comma would change"
    return ",".join(files)


def totals(manifest: dict) -> dict:
    """Rows and sums; labels and weights must be floating without nulls, and all files must have one schema."""
    files = [pq.ParquetFile(f) for f in paths(manifest).split(",")]
    assert len({str(f.schema_arrow) for f in files}) == 1, "files of different schemas"
    rows = pa.concat_tables(f.read(["target", "label", "pseudo_label", "sample_weight"]) for f in files)
    assert all(pa.types.is_floating(c.type) and not c.null_count for c in rows.columns), "nulls, or not floating"
    sums = {n: pc.sum(rows[n].cast("double")).as_py() for n in ("label", "pseudo_label", "sample_weight")}
    return {"rows": len(rows), "weight_sum": sums.pop("sample_weight"), **{f"{n}_sum": v for n, v in sums.items()}}


if __name__ == "__main__":
    print(CONFIG.format(paths=paths(json.loads(Path(sys.argv[1]).read_text()))))
