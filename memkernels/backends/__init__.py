"""One package per backend; none imports another. Calling this package, `memkernels.backends()`, lists them."""

from memkernels._modules import make_callable


def _load():
    from memkernels._backends import backends

    return backends


make_callable(__name__, _load)
