"""Shapes of the model's functions are checked as they are annotated."""

import jaxtyping

CHECKED = ("block", "decoder", "dense")
jaxtyping.install_import_hook([f"jaxkv.models.{module}" for module in CHECKED], "beartype.beartype")
