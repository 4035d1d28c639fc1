"""What a raw value becomes, and what is refused because the cast would change it."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.contracts.contract import load_contract
from gpl_core.contracts.raw_values import cast, castable, drift

EPOCH = datetime(1970, 1, 1)
NOON = (datetime(2026, 1, 10, 12) - EPOCH) // timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("value", "have", "wanted", "expected"),
    [
        (12345701.0, "double", "string", "12345701"),  # not 1.2345701E7
        (-0.0, "double", "string", "0"), (0.5, "double", "string", None), (2.0**53, "double", "string", None),
        (float(2**24 - 1), "float", "string", "16777215"), (float(2**24), "float", "string", None),
        ("12.00", "decimal(9,2)", "string", "12"), ("12.50", "decimal(9,2)", "string", None),
        (2**63 - 1, "long", "string", "9223372036854775807"), (" a ", "string", "string", " a "),
        ("7", "string", "int", 7), (" +7.0 ", "string", "int", 7), ("7.5", "string", "int", None),
        (1.0, "double", "int", 1),
        (True, "boolean", "int", 1), (2**31, "long", "int", None), ("9" * 10_000, "string", "long", None),
        ("12.50", "string", "double", 12.5), ("12,50", "string", "double", None), ("1e-3", "string", "double", 0.001),
        ("NaN", "string", "double", None), ("\uff11", "string", "int", None), ("0.5", "decimal(3,1)", "double", 0.5),
        (" Yes ", "string", "boolean", True), ("0", "string", "boolean", False), (1, "byte", "boolean", True),
        (2, "integer", "boolean", None), ("perhaps", "string", "boolean", None),
        ("2026-01-10 12:00:00", "string", "timestamp", NOON),
        ("2026-01-10T14:00:00+02:00", "string", "timestamp", NOON),
        ("2026-01-10 12:00", "string", "timestamp", NOON), ("2026-01-10T14:00+02:00", "string", "timestamp", None),
        ("2026-01-10T12:00:00.000000999Z", "string", "timestamp", NOON), (NOON, "timestamp_ntz", "timestamp", NOON),
        ("2026-01-10", "date", "timestamp", NOON - 43_200_000_000), ("10.01.2026", "string", "timestamp", None),
        ("2026-02-30", "string", "timestamp", None), ("2026-01-10 24:00:00", "string", "timestamp", None),
        ("20260110", "string", "date", "2026-01-10"), (20260110, "integer", "date", "2026-01-10"),
        (NOON, "timestamp", "date", "2026-01-10"), ("2026-01-10T23:30:00-01:00", "string", "date", "2026-01-11"),
        ("+10000-01-01", "date", "date", None), (2**63 - 1, "timestamp", "date", None),
        ("0000-12-31", "date", "date", None),
        (None, "string", "int", None),
    ],
)  # fmt: skip
def test_a_value_is_cast_or_refused(value, have, wanted, expected):
    assert cast(value, have, wanted) == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_an_id_survives_every_type_that_can_hold_it_and_no_other(number):
    assert cast(number, "long", "string") == str(number)
    assert cast(str(Decimal(number)), "decimal(20,0)", "string") == str(number)
    through = cast(float(number), "double", "string")
    assert through == (str(number) if abs(number) < 2**53 else None)


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)))
def test_a_time_as_text_is_the_time_and_its_day(time):
    micros = (time - EPOCH) // timedelta(microseconds=1)
    for text in (time.isoformat(), time.isoformat(" ") + "Z"):
        assert cast(text, "string", "timestamp") == micros
        assert cast(text, "string", "date") == time.date().isoformat()


def test_a_type_that_would_be_a_guess_is_refused_as_a_whole():
    assert not castable("long", "timestamp")
    assert not castable({"type": "map"}, "string")
    assert castable({"type": "array", "elementType": "double"}, "array<float>")
    contract = load_contract("raw_opt_outs")
    assert drift(contract, {"user_id": "long", "opted_out_at": "date", "more": {"type": "map"}}) == []
    assert drift(contract, {"opted_out_at": "long"}) == [
        "column 'user_id' (string) is missing",
        "column 'opted_out_at' is long, expected timestamp, to which it cannot be cast",
    ]
