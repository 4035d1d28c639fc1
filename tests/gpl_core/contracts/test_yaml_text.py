"""YAML: what a person writes is read, what would fill the memory is refused before it does."""

from __future__ import annotations

import pytest
import yaml

from gpl_core.config import load_config
from gpl_core.contracts.contract import parse_contract
from gpl_core.contracts.yaml_text import InvalidYamlError, read_yaml
from gpl_core.errors import ContractError, UsageError

# Ten lists of ten of the list before: 10^10 words once it is written out.
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 11))
MERGED = "b0: &b0 {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 10)}]}}\n" for i in range(1, 11))
ITSELF = "a: &a [*a]"


@pytest.mark.parametrize(
    "text",
    ["", "a: [1, 2.5, yes, null, 2026-01-03, text]", "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "- &x 1\n- *x"],
)
def test_what_a_person_writes_is_what_yaml_says(text):
    assert read_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", [LAUGHS, MERGED, ITSELF, "[1, " * 60_000 + "]" * 60_000])
def test_what_would_fill_the_memory_is_refused(text):
    with pytest.raises(InvalidYamlError, match=r"more than 100,000 values, with every alias|nested too deeply"):
        read_yaml(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: *b", "undefined alias"), ("d: 2026-13-01", "month"), ("a: !!python/object:os.system x", "python/object"),
     (f"n: {'9' * 5000}", "4300 digits"), ("a: b: c", "line 1"),
     ("a: 1\nb: {c: 1, c: 2}", "line 2.*'c' is given twice"), ("a: {b: 1}\na: {c: 1}", "'a' is given twice")],
)  # fmt: skip
def test_what_is_no_yaml_is_refused_by_its_cause(text, named):
    with pytest.raises(InvalidYamlError, match=named):
        read_yaml(text)


def test_configurations_and_contracts_name_the_file_of_a_bomb(tmp_path):
    path = tmp_path / "bomb.yaml"
    path.write_text(LAUGHS)
    with pytest.raises(UsageError, match=r"(?s)bomb.yaml.*line.*more than 100,000 values"):
        load_config(str(path))
    with pytest.raises(UsageError, match=r"(?s)--set a=.*more than 100,000 values"):
        load_config("quickstart", [f"a={ITSELF.removeprefix('a: ')}"])
    with pytest.raises(ContractError, match=r"(?s)bomb.yaml.*more than 100,000 values"):
        parse_contract(LAUGHS, "bomb.yaml")
