"""`python -m gdsdirect`: the command line."""

import sys

from gdsdirect.cli import main

if __name__ == "__main__":
    sys.exit(main())
