"""Whether programs update the cache in place, asked of the compiler: `tests.compiled.check_aot`."""
