"""Hints for failures that only a launcher or a library sees, found by phrases in its log."""

from pathlib import Path

_GPU_MEMORY = (
    "the GPU ran out of memory: lower anchors.tokens_per_batch, interest.tokens_per_batch or labels.users_per_batch"
)
_JARS = "Delta's jars were not found: check --packages or --jars in launch.spark_submit"
_HINTS = {
    "java.lang.OutOfMemoryError": "Spark ran out of memory: give it more, launch.spark_submit: [--driver-memory, 8g]",
    "CodeCache": "the JVM ran out of space for compiled code: put -XX:ReservedCodeCacheSize=256m (or more) under "
    "launch.spark_submit: [--driver-java-options, …]",
    "torch.OutOfMemoryError": _GPU_MEMORY,
    "CUDA out of memory": _GPU_MEMORY,
    "Address already in use": "a port is in use: choose another one, launch.deepspeed: [--master_port, '29511']",
    "No space left on device": "a disk is full: free some space, or move lakehouse.root, TMPDIR or spark.local.dir",
    "ClassNotFoundException: io.delta": _JARS,
    "unresolved dependency: io.delta": "Maven could not be reached: use local jars, launch.spark_submit: [--jars, …]",
}


def hints(log: Path) -> list[str]:
    """One line for each known cause found in `log`."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return list(dict.fromkeys(f"hint: {hint}" for words, hint in _HINTS.items() if words in text))
