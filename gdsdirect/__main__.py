"""`python -m gdsdirect`: the command line."""

import sys

from gdsdirect.cli import main

sys.exit(main())
