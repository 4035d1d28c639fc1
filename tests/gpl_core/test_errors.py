"""Exit codes: each error stands for one, and the root catches them all."""

from __future__ import annotations

import inspect

import pytest

from gpl_core import errors
from gpl_core.errors import GplError, exit_code_of

CODES = {
    "GplError": 1, "UsageError": 2, "ContractError": 3, "GateError": 3, "QuarantineError": 3, "LineageError": 3,
    "ConflictError": 3, "MissingInputError": 4,
}  # fmt: skip


def test_every_error_is_a_gpl_error_with_its_code():
    found = {n: c for n, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}
    assert {name: kind.exit_code for name, kind in found.items()} == CODES
    assert all(issubclass(kind, GplError) for kind in found.values())
    assert all(kind.__doc__ for kind in found.values())


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError()])
def test_what_we_did_not_raise_is_unexpected(error):
    assert exit_code_of(error) == 1


def test_an_error_with_a_code_of_its_own_keeps_it():
    class Peer(GplError):
        exit_code = 1

    peer = Peer("another rank")
    peer.exit_code = 4
    assert exit_code_of(peer) == 4
