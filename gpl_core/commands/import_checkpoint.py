"""`gpl import-checkpoint`: a GGUF file as a folder that `interest.base_model` can name."""

import argparse
from pathlib import Path

from gpl_core.commands.command import Command
from gpl_core.errors import UsageError
from gpl_core.lakehouse.scratch import scratch_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.gguf", type=Path, help="the model to convert; it is not modified")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to create; it must not exist yet")


def run(args: argparse.Namespace) -> int:
    """Write the folder whole, or not at all."""
    from gpl_core.interest.gguf_import import import_gguf  # takes torch

    if args.folder.exists():
        raise UsageError(f"{args.folder} already exists; choose a new folder, or remove this one")
    args.folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(parent=args.folder.parent) as aside:
        import_gguf(args.file, aside)
        aside.chmod(0o755)
        for file in aside.iterdir():
            file.chmod(0o644)
        aside.rename(args.folder)
    size = sum(f.stat().st_size for f in args.folder.iterdir())
    print(f"{args.folder}: {size / 1e6:,.0f} MB; set interest.base_model to this folder")
    return 0


COMMAND = Command(
    "import-checkpoint", "convert a GGUF file into a checkpoint folder for interest.base_model", run, add_arguments,
    needs_config=False,
    examples=("SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2",),
)  # fmt: skip
