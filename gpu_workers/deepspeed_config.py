"""The DeepSpeed configuration with which the interest model is trained."""

from pathlib import Path
from typing import Any

from gpl_core.conf.sections import Interest
from gpu_workers.ranks import Ranks

_WARMUP_SHARE = 0.05  # of the steps


def deepspeed_config(settings: Interest, ranks: Ranks, steps: int, logs: Path) -> dict[str, Any]:
    """The DeepSpeed configuration of a run of about ``steps`` steps; `interest.deepspeed` is merged over it."""
    on_gpu = ranks.device.type == "cuda"
    warmup = max(2, round(_WARMUP_SHARE * steps))
    made = {
        "train_batch_size": ranks.size,
        "train_micro_batch_size_per_gpu": 1,  # one pack
        "gradient_clipping": 1.0,
        "bf16": {"enabled": on_gpu},
        "zero_optimization": {"stage": 2, "overlap_comm": on_gpu},
        # DeepSpeed's own Adam kernels are compiled on first use; torch's needs no compiler.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": settings.learning_rate, "weight_decay": 0.0, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": steps,
                "warmup_num_steps": warmup,
                # Not 0: DeepSpeed takes its first two steps at this rate.
                "warmup_min_lr": settings.learning_rate / warmup,
                "warmup_max_lr": settings.learning_rate,
                "warmup_type": "linear",
            },
        },
        "tensorboard": {"enabled": True, "output_path": str(logs), "job_name": "tensorboard"},
        "csv_monitor": {"enabled": True, "output_path": str(logs), "job_name": "csv"},
        "steps_per_print": 2**31 - 1,
    }
    return _merged(made, settings.deepspeed)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
