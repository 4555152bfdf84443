"""An extension of griffe, which reads the docstrings: an `Example:` is a section of examples."""

import re

import griffe


class Examples(griffe.Extension):
    """Griffe knows the section as `Examples:`; any other title is a box of plain text to it."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called for every object once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(
                r"^( *)Example:$",
                r"\1Examples:",
                obj.docstring.value,
                flags=re.MULTILINE,
            )
