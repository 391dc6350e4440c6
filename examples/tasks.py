"""The tasks of the papers, one after the other: copy, repeat-copy and associative recall by a machine, multi-query recall by a layer.

python examples/tasks.py [TASK ...] [--model ntm] [--memory attention] [--seconds 300] [--seed 0]

Each prints its seed, what was published, the error as it falls and whether the target was reached; `memkernels train-task` runs one of
them. Exit code 1: one was not solved within its time.
"""

import argparse
import sys

from rich.console import Console

from memkernels.cli import mqar, tasks


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = (*tasks.TASKS, "mqar")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--model", default="ntm", choices=tasks.MODELS, help="machine of the first three")
    parser.add_argument("--memory", default="attention", choices=mqar.MODELS, help="memory of mqar")
    parser.add_argument("--seconds", type=float, default=300.0, help="the longest to train, each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in args.tasks:
        if name not in every:
            parser.error(f"TASK: expected one of {', '.join(every)}, got {name!r}")
    console, solved = Console(), []
    for name in args.tasks or every:
        if name == "mqar":
            found = mqar.run(console, args.memory, args.seconds, args.seed, batch=128, rate=3e-3)
        else:
            found = tasks.run(console, name, args.model, args.seconds, args.seed, batch=16, rate=None)
        solved.append(found["solved"])
    return 0 if all(solved) else 1


if __name__ == "__main__":
    sys.exit(main())
