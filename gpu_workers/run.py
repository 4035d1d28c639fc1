"""Several worker steps in one launch: what `gpl run` starts for workers that follow each other.

deepspeed … gpu_workers/run.py --steps train_tokenizer,assign_sids --config CONFIG --run-date D
"""

from gpu_workers.worker import run_workers

if __name__ == "__main__":
    run_workers("run.py")
