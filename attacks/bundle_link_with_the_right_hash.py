"""A file of the bundle is a symbolic link to a file outside, and the manifest has its hash.

The attacker, who knows or guesses what the file holds, wants to learn whether the user has it, or
to have it copied. The hash must not matter: the link must be refused.
"""

from __future__ import annotations

from attacks.common import Place, list_file, read_all, run


def attack(place: Place) -> None:
    path = place.bundle / "tokenizer.json"
    path.unlink()
    path.symlink_to("../outside/secret.txt")
    list_file(place.bundle, "tokenizer.json")
    read_all(place)


if __name__ == "__main__":
    run(attack)
