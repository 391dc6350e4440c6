"""One file per op, each with a `SPEC`; `memkernels.testing.specs()` collects them."""
