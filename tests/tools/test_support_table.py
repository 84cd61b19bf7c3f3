from __future__ import annotations

from tests.backbones import ARCHITECTURES, tiny_pretrained
from tools.support_table import BEGIN, END, HEADER, PAGE, described, replaced_table


def table() -> list[list[str]]:
    text = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")[1:-1]]


def test_the_table_of_the_page_is_current() -> None:
    header, _, *rows = table()
    assert tuple(header) == HEADER
    assert [row[0] for row in rows] == [f"{n} (`{kind}`)" for n, (kind, _) in ARCHITECTURES.items()]
    for name, row in zip(ARCHITECTURES, rows, strict=True):
        assert tuple(row[1:3]) == described(tiny_pretrained(name)), name
        assert set(row[3:]) <= {"yes", "no", "not run"}


def test_a_table_is_replaced_and_nothing_else() -> None:
    text = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    cells = ("a", "b", "c", "d", "e", "f")
    found = replaced_table(text, [cells])
    assert found == (
        f"before\n\n{BEGIN}\n| {' | '.join(HEADER)} |\n{'|---' * 6}|\n| a | b | c | d | e | f |\n"
        f"{END}\n\nafter\n"
    )
    assert replaced_table(found, [cells]) == found
