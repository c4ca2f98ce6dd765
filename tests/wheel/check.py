"""What must hold of wheels before anybody gets them: `python tests/wheel/check.py WHEEL...`."""

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MOST_BYTES = 1 << 20
LICENCES = {"LICENSE", "csrc/liburing-LICENSE.txt"}
EXTENSIONS = {"_nvme_sqe", "_uring_cmd"}


def printed(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, check=True, text=True
    ).stdout


def check(wheel: Path) -> None:
    assert "-manylinux" in wheel.name, "tagged for this machine alone: run auditwheel"
    assert wheel.stat().st_size < MOST_BYTES, f"{wheel.stat().st_size} bytes"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        licences = {path.partition("/licenses/")[2] for path in archive.namelist()}
        assert licences >= LICENCES, f"licences: {licences}"
        extensions = {path.name.partition(".")[0]: path for path in Path(folder).rglob("*.so")}
        assert extensions.keys() == EXTENSIONS, f"extensions: {list(extensions)}"
        for module, path in extensions.items():
            symbols = printed("nm", "--dynamic", "--defined-only", path).split()[2::3]
            assert symbols == [f"PyInit_{module}"], f"{module} exports {symbols}"
            needed = re.findall(
                r"NEEDED.*\[(.*)\]", printed("readelf", "--dynamic", "--wide", path)
            )
            assert not any("liburing" in name for name in needed), f"{module} needs {needed}"
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")


for argument in sys.argv[1:]:
    check(Path(argument))
