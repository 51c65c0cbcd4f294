"""`python -m tl_tutorial` is the command line `tl-tutorial`; torchrun needs this form."""

import sys

from tl_tutorial.cli import main

if __name__ == "__main__":
    sys.exit(main())
