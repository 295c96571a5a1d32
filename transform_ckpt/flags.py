"""Values of command-line flags, as people write them.  Imports nothing of the project."""

from __future__ import annotations

import argparse

TRUE, FALSE = ("true", "1", "yes", "y", "on"), ("false", "0", "no", "n", "off", "")


def boolean(text: str) -> bool:
    """`True`, `false`, `1`, `no` ... as people write them; anything else is refused."""
    word = text.strip().lower()
    if word not in (*TRUE, *FALSE):
        raise argparse.ArgumentTypeError(f"{text!r} is not a boolean: write True or False")
    return word in TRUE
