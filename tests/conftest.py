"""What all tests share.

The package under test is the installed one, so the repository's root is never on sys.path (run
pytest as `python -P -m pytest`). The lab is not installed: it is imported from its folder.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# They run inside the virtual machine, started by test_in_lab.py.
collect_ignore = ["lab"]


def _import_lab() -> None:
    folder = ROOT / "lab"
    spec = importlib.util.spec_from_file_location(
        "lab", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["lab"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_import_lab()
