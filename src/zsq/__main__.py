"""`python -m zsq` is the command `zsq`."""

from zsq.cli import main

if __name__ == "__main__":
    main()
