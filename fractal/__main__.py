"""`python -m fractal`: the same as the command `fractal`."""

import sys

from fractal.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
