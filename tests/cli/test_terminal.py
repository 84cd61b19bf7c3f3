"""Tables: aligned, and never wider than a terminal."""

from __future__ import annotations

from fwl_export.cli.terminal import size, table


def test_a_table_is_aligned() -> None:
    rows = [("a", "1", "2"), ("long name", "10", "")]
    assert table(("name", "x", "value"), rows).splitlines() == [
        "name        x  value",
        "a           1      2",
        "long name  10",
    ]


def test_a_wide_table_wraps_its_header_first() -> None:
    found = table(("", "time, T = 1", "use"), [("standard inference", "1.00", "5")], columns=30)
    assert found.splitlines() == [
        "                   time,",
        "                   T = 1 use",
        "standard inference  1.00   5",
    ]


def test_then_the_cells_of_its_first_column() -> None:
    found = table(("class", "gain"), [("known token, new pair", "0.1"), ("new", "")], columns=20)
    assert found.splitlines() == [
        "class           gain",
        "known token,     0.1",
        "new pair",
        "new",
    ]


def test_a_table_without_rows() -> None:
    assert table(("file", "size"), []) == "file  size"


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 1500, 2.5e6, 3e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "5000.0 GB",
    ]
