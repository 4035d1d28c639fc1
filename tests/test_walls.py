"""The walls between the rooms hold, and a bad import is refused, lazy or through another module too."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("gpl_core", "spark_jobs", "gpu_workers")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The three packages and the tools' settings, to plant bad imports in."""
    root = tmp_path_factory.mktemp("tree")
    for room in ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def lint(root: Path) -> tuple[int, str]:
    """Exit code and output of import-linter over the packages under `root`."""
    tool = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([tool, "--no-cache"], cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def test_the_walls_hold_as_the_code_stands(copy):
    code, said = lint(copy)
    assert code == 0, said
    assert "0 broken" in said


def test_bad_imports_are_refused_each_under_its_walls_name(copy):
    """All planted at once: one report must name every one of them."""
    planted = {
        "spark_jobs/bad_direct.py": "def late():\n    import torch\n    return torch\n",
        "spark_jobs/bad_through_core.py": "from gpl_core.sids import trie, tokenizer\n",
        "gpu_workers/bad_spark.py": "def late():\n    from pyspark.sql import functions\n    return functions\n",
        "gpl_core/bad_spark.py": "import pyspark\n",
        "gpl_core/bad_room.py": "def late():\n    import gpu_workers.inputs.feed\n    return gpu_workers\n",
        "gpl_core/labels/calibration.py": (copy / "gpl_core/labels/calibration.py").read_text() + "\nimport torch\n",
        "spark_jobs/bad_cli.py": "import gpl_core.cli\n",
        "gpl_core/contracts/bad_layer.py": "def late():\n    import gpl_core.graph.planner\n    return gpl_core\n",
        "gpu_workers/inputs/bad_one.py": "import gpu_workers.inputs.bad_other\n",
        "gpu_workers/inputs/bad_other.py": "import gpu_workers.inputs.bad_one\n",
    }
    kept = {name: (copy / name).read_text() for name in planted if (copy / name).exists()}
    for name, text in planted.items():
        (copy / name).write_text(text)
    try:
        code, said = lint(copy)
    finally:
        for name in planted:
            (copy / name).write_text(kept[name]) if name in kept else (copy / name).unlink()
    assert code != 0
    for part in (
        "spark_jobs.bad_direct -> torch",
        "spark_jobs.bad_through_core ->",
        "gpu_workers.bad_spark -> pyspark",
        "gpl_core.bad_spark -> pyspark",
        "gpl_core.bad_room -> gpu_workers",
        "gpl_core.labels.calibration -> torch",
        "spark_jobs.bad_cli -> gpl_core.cli",
        "gpl_core.contracts.bad_layer -> gpl_core.graph.planner",
        "No cycles are allowed in gpu_workers.inputs.",
    ):
        assert part in said, f"'{part}' is not named:\n{said}"


@pytest.mark.parametrize("room", ["gpl_core", "spark_jobs", "gpu_workers"])
def test_importing_a_package_runs_nothing(room):
    """`__init__.py` files hold a docstring and at most the version: no import drags a room in.

    That of gpl_core also offers the names of its interface, each imported when it is asked for (test_api).
    """
    for path in {*(ROOT / room).rglob("__init__.py")} - {ROOT / "gpl_core" / "__init__.py"}:
        body = ast.parse(path.read_text()).body
        assert isinstance(body[0], ast.Expr), f"{path} says what its package is"
        assert all(isinstance(node, ast.Assign) for node in body[1:]), f"{path} imports or runs something"


_RUN_WHAT_THEY_READ = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
_LOADERS = {"load_checkpoint", "read_pickle", "unsafe_load", "full_load", "from_pickle"}


def doors(tree: ast.AST) -> Iterator[ast.AST]:
    """Where a module could run what lies in a file: unpickling, remote code, YAML with tags, eval."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(name.split(".")[0] in _RUN_WHAT_THEY_READ for name in names):
                yield node
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            models = called.endswith("from_pretrained") and "Tokenizer" not in called and "Processor" not in called
            if (
                called in ("eval", "exec", "torch.load", "torch.jit.load", "yaml.load", "yaml.load_all")
                or (isinstance(node.func, ast.Attribute) and node.func.attr in _LOADERS)
                or (models and given.get("use_safetensors") != "True")
                or (called.endswith("from_pretrained") and given.get("trust_remote_code") != "False")
            ):
                yield node


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import joblib", "import torch; torch.load(p, weights_only=True)",
        "engine.load_checkpoint(folder)", "np.load(p, allow_pickle=True)", "np.load(p, allow_pickle=flag)",
        "yaml.load(text, Loader)", "yaml.unsafe_load(text)", "pd.read_pickle(p)", "eval(text)",
        "Model.from_pretrained(p, trust_remote_code=False)", "AutoTokenizer.from_pretrained(p)",
        "Model.from_pretrained(p, use_safetensors=True, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_a_door_is_seen(line):
    assert list(doors(ast.parse(line)))


# Weights that a package carries, pinned by their SHA-256 and read as tensors alone.
PINNED = {"gpl_core/sids/picture_models.py": "torch.load(file, map_location='cpu', weights_only=True)"}


def test_no_module_runs_what_it_reads():
    found = [
        f"{name}:{node.lineno}"
        for path in modules()
        for name in [path.relative_to(ROOT).as_posix()]
        for node in doors(ast.parse(path.read_text(encoding="utf-8")))
        if ast.unparse(node) != PINNED.get(name)
    ]
    assert found == []


def modules() -> Iterator[Path]:
    """Every module of the product."""
    for room in ROOMS:
        yield from (ROOT / room).rglob("*.py")


def test_a_module_can_be_read_at_one_sitting():
    """At most 400 lines: a longer one holds two ideas."""
    lengths = {p.relative_to(ROOT).as_posix(): len(p.read_text(encoding="utf-8").splitlines()) for p in modules()}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_a_class_name_means_one_thing():
    """What a name stands for never depends on where it was imported from."""
    places = defaultdict(list)
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
