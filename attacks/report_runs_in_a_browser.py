"""A parity report whose names and texts are HTML with scripts.

The attacker wants the page that is made from it to run them, or to fetch something. All text must
stay text.
"""

from __future__ import annotations

import html.parser

from attacks.common import Place, run

EVIL = "</script></title></style><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='x"


class Elements(html.parser.HTMLParser):
    """Collects the names of elements, and attributes that run code or fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect an element."""
        self.found.append(tag)
        self.found += [
            name for name, _ in attrs if name.startswith("on") or name in ("src", "href")
        ]


def attack(place: Place) -> str | None:
    import numpy as np

    from fwl_export.bundle.manifest import read_bundle
    from fwl_export.parity import check_bundle
    from fwl_export.parity.report.html import to_html, to_html_table

    report = check_bundle(
        read_bundle(place.bundle), np.arange(30), tokens=8, cases="text"
    ).to_dict()
    good = [made(report) for made in (to_html, to_html_table)]
    bad = [made(spoiled(report)) for made in (to_html, to_html_table)]
    same = all(elements(a) == elements(b) for a, b in zip(good, bad, strict=True))
    return "harmless: the page has the same elements as a good one" if same else None


def spoiled(data: object) -> object:
    """Return a report in which every text is followed by markup.

    Args:
      data: Data of the report, or a part of it.
    """
    if isinstance(data, dict):
        return {key: spoiled(value) if key != "mode" else value for key, value in data.items()}
    if isinstance(data, list):
        return [spoiled(item) for item in data]
    return f"{data}{EVIL}" if isinstance(data, str) else data


def elements(page: str) -> list[str]:
    """Return what a browser would build from a page: its elements and what runs in them.

    Args:
      page: The page as HTML.
    """
    parser = Elements()
    parser.feed(page)
    # A script's text is not parsed, so one that is closed early shows as more elements.
    return parser.found


if __name__ == "__main__":
    run(attack)
