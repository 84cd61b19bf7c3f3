"""A bundle in a folder like the Hugging Face cache, in which the folder of contents is a link.

The attacker mails the whole folder, with `blobs` or one of the files in it linked to something
outside. Neither must count as part of the cache.
"""

from __future__ import annotations

from attacks.common import Place, list_file, run
from fwl_export.bundle.manifest import read_bundle
from fwl_export.errors import FwlError


def attack(place: Place) -> object:
    root = place.bundle.with_name("cache")
    bundle = root / "snapshots" / "main"
    bundle.parent.mkdir(parents=True)
    place.bundle.rename(bundle)
    tokenizer = bundle / "tokenizer.json"
    tokenizer.unlink()
    tokenizer.symlink_to("../../blobs/secret.txt")
    refused = []
    for link, target in (("blobs", "../outside"), ("blobs/secret.txt", "../../outside/secret.txt")):
        (root / link).symlink_to(target)
        list_file(bundle, "tokenizer.json")
        try:
            read_bundle(bundle).verify()
        except FwlError as error:
            refused.append(error)
        (root / link).unlink()
        (root / "blobs").mkdir(exist_ok=True)
    if len(refused) == 2:
        raise refused[0]
    return refused


if __name__ == "__main__":
    run(attack)
