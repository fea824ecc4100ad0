"""Tables of cases as parameters of tests."""

from __future__ import annotations

from typing import Any

import pytest


def rows(table: dict[str, Any], gaps: dict[str, str] | None = None) -> list[Any]:
    """One test for each row of a table; a row whose name is among the gaps fails for the reason given there."""
    gaps = gaps or {}
    assert gaps.keys() <= table.keys()
    marks = {name: pytest.mark.xfail(strict=True, reason=reason) for name, reason in gaps.items()}
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), id=name, marks=marks.get(name, ()))
        for name, row in table.items()
    ]
