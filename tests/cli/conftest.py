from __future__ import annotations

from pathlib import Path

import pytest

TEXT = "EXIT, PURSUED BY A BEAR. THOU MET'ST WITH THINGS DYING, I WITH THINGS NEW-BORN. "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "play.txt"
    path.write_text(TEXT * 3)
    return path
