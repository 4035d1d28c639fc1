"""One process group for all tests that run a worker inside this process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def one_rank():
    """This process as the only rank. Never destroyed: DeepSpeed keeps a handle and cannot start a second one."""
    from gpu_workers.ranks import start_ranks

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield start_ranks()
