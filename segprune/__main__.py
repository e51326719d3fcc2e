"""`python -m segprune` is the command `segprune`."""

from segprune.cli import main

if __name__ == "__main__":
    main()
