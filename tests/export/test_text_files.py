"""What else a model says about text goes from its checkpoint into the bundle."""

from __future__ import annotations

import json
from pathlib import Path

from fwl_export import export_bundle
from fwl_export.bundle.text_tokenizer import bundle_text_tokenizer
from tests.bundles import MAX_TOKENS, write_checkpoint

FILES = {
    "tokenizer_config.json": json.dumps({"bos_token": "A", "add_bos_token": True}),
    "generation_config.json": json.dumps({"eos_token_id": [3, 4]}),
    "chat_template.jinja": "{{ messages[0].content }}",
}


def test_a_bundle_is_enough_to_read_text(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    for name, content in FILES.items():
        (checkpoint / name).write_text(content)
    bundle = export_bundle(checkpoint, tmp_path / "bundle", max_tokens=MAX_TOKENS)
    for name in FILES:
        assert {name, f"checkpoint/{name}"} <= bundle.manifest.files.keys()
    (checkpoint / "tokenizer_config.json").unlink()
    tokenizer = bundle_text_tokenizer(bundle)
    assert tokenizer.bos_id == tokenizer.tokenizer.token_to_id("A") == 33
    assert tokenizer.encode("BC", start=True).tolist() == [33, 34, 35]
    assert tokenizer.end_ids == {3, 4}
    assert tokenizer.chat_template == "{{ messages[0].content }}"
    assert tokenizer.special_tokens == {"bos_token": "A"}
