"""Multi-query associative recall with two memories of this package: `attention` over all places, `topk_read` of the best ones.

    python examples/mqar.py [--seconds 300] [--seed 0]

The same as `memkernels train-task mqar --model attention` and `--model topk`, one after the other.
"""

import argparse

from rich.console import Console

from memkernels.cli import mqar


def main(seconds=300.0, seed=0):
    return {memory: mqar.run(Console(), memory, seconds, seed, batch=128, rate=3e-3)["accuracy"] for memory in mqar.MODELS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.seconds, arguments.seed)
