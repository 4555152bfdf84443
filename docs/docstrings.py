"""Extensions of griffe, which reads the docstrings."""

import ast
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


class Counters(griffe.Extension):
    """The text of a counter, `name = counter(number, "text")`, is its docstring."""

    def on_attribute_instance(
        self, *, node: ast.AST, attr: griffe.Attribute, **_
    ) -> None:
        """Called for every attribute once it is loaded."""
        value = getattr(node, "value", None)
        if (
            isinstance(value, ast.Call)
            and getattr(value.func, "id", "") == "counter"
        ):
            text = ast.literal_eval(value.args[1])
            attr.docstring = griffe.Docstring(text, parent=attr)
            attr.value = None
            attr.annotation = 'Int[Array, ""]'
