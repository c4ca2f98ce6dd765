"""What the package costs, beside what the same work costs in C and in other packages.

Measured is the installed package. But `python -m benchmarks`, run from the repository's root, finds
that folder's own `gdsdirect` first, which has no built extensions: so the root goes last.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if Path(sys.path[0]).resolve() == ROOT:
    sys.path.append(sys.path.pop(0))
