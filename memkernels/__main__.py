"""`python -m memkernels`: the command line."""

from memkernels.cli import main

if __name__ == "__main__":
    main()
