"""Addresses as they may be shown and stored: what may be secret in them is left out."""

from __future__ import annotations

import re

LEFT_OUT = "…"
"""Stands for what was left out."""

_USER = re.compile(r"(://)[^\s?#]*@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


def without_query(address: str) -> str:
    """The address with `?…` in place of its query, which often holds a key."""
    return _QUERY.sub(rf"\1?{LEFT_OUT}", address)


def hide_secrets(text: str) -> str:
    """A text whose addresses have neither query nor user name and password."""
    return _USER.sub(rf"\1{LEFT_OUT}@", without_query(text))
