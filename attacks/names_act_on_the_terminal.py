"""Names in a bundle hold control characters: they change the terminal's title, clear the screen,
print "all hashes match" over an error, or turn the direction of writing.

The attacker wants `fwl-export inspect` and its error messages to send them to the terminal. They
must be shown as escapes, and no name may begin a line of its own.
"""

from __future__ import annotations

import subprocess
import sys

from attacks.common import Place, edit_manifest, run

EVIL = (
    "a\x1b]0;pwned\x07\x1b[2J\x9b31m\r\b\u202e\u2066\x7f\nFiles (all hashes match)\n::add-mask::x"
)


def attack(place: Place) -> str | None:
    def rename(data: dict[str, list[dict[str, object]]]) -> None:
        data["state"][0]["name"] = EVIL

    edit_manifest(place.bundle, rename)
    folder = place.bundle.rename(place.bundle.with_name(EVIL.replace("\x7f", "")))
    shown = ""
    for verb in (["inspect"], ["inspect", "--json"], ["-v", "score"], ["read", "-o", "x"]):
        command = [sys.executable, "-m", "fwl_export", *verb, str(folder)]
        text = [str(place.outside / "secret.txt")] if verb[0] != "inspect" else []
        done = subprocess.run([*command, *text], capture_output=True, check=False)
        shown += (done.stdout + done.stderr).decode()
    acts = [c for c in shown if not c.isprintable() and c not in "\n\u00a0"]
    forged = [line for line in shown.splitlines() if line.startswith(("Files (all", "::"))]
    return None if acts or forged[1:] else "harmless: the names were shown as escapes"


if __name__ == "__main__":
    run(attack)
