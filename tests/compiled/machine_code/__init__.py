"""Machine code of the kernels for every GPU they are meant for: `tests.compiled.check_targets`."""
