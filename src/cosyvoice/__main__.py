"""`python -m cosyvoice` is the command `cosyvoice`."""

from cosyvoice.cli import main

if __name__ == "__main__":
    main()
