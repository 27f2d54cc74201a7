"""griffe extension: how this project's docstrings become pages.

``Example:`` is a section of code. Of Sphinx's roles, ``:func:`tetris.fuse```, the name stays.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):(?=`)")


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for everything that has been read."""
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", EXAMPLE.sub(r"\1Examples:", obj.docstring.value))
