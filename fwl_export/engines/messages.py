"""Error messages of TensorRT's parser and builder, shortened to what a user can act on."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Messages carry places in the builder's own source code, which say nothing to a user.
_NOISE = (
    r"^\w+::\w+: Error Code \d+: ",  # IBuilder::buildSerializedNetwork: Error Code 1:
    r"\[\w+\.\w+:\d+: \w+\] ?",  # [pass.cpp:337: check_turing_op_compatibility]
    r"\.? In \w+ at /?[\w./]+:\d+",  # . In compileGraph at codeGenerator.cpp:2012
)


def shorten(errors: Sequence[str]) -> str:
    """Return the first message that says what is wrong, on one line and without its final period.

    Args:
      errors: The messages that were logged, oldest first; at least one.
    """
    # The parser first quotes the node around its error, in messages that start with a place in its
    # source; the error itself comes after them.
    telling = [message for message in errors if not message.startswith("ModelImporter.cpp")]
    text = " ".join((telling or errors)[0].split())
    for noise in _NOISE:
        text = re.sub(noise, "", text)
    return text.rstrip(". ")
