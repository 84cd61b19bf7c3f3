"""A tokenizer whose tokens are escape sequences, which the model then generates.

The attacker wants `fwl-export generate` to send them to the terminal. There they must be shown as
escapes; a file or a pipe gets the text as it is.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

from attacks.common import Place, list_file, run

EVIL = "\x1b]0;pwned\x07\x1b[2J"


def attack(place: Place) -> str | None:
    path = place.bundle / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = {EVIL + str(n): n for n in range(len(data["model"]["vocab"]))}
    data["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": EVIL + "0"}
    data |= {"pre_tokenizer": None, "decoder": None, "normalizer": None, "post_processor": None}
    path.write_text(json.dumps(data), encoding="utf-8")
    list_file(place.bundle, "tokenizer.json")
    command = [sys.executable, "-m", "fwl_export", "generate", str(place.bundle), "--prompt", "x"]
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        done = subprocess.run(
            [*command, "--max-new", "3"], stdout=theirs, stderr=subprocess.PIPE, check=True
        )
        os.close(theirs)
        shown = terminal.read(1 << 16).decode()
    assert done.returncode == 0
    if "\x1b" in shown or "\x07" in shown or b"\x07" in done.stderr:
        return None
    assert r"\x1b]0;pwned\x07" in shown, shown
    return "harmless: the tokens were shown as escapes"


if __name__ == "__main__":
    run(attack)
