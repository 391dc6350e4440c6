"""One file per op, each with a `SPEC`; calling this package, `memkernels.testing.specs()`, collects them."""

from memkernels._modules import make_callable


def _load():
    from memkernels.testing.spec import specs

    return specs


make_callable(__name__, _load)
