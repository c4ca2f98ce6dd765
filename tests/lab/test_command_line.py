"""`gdsdirect read` of real drives."""

import hashlib
import subprocess
import sys
from pathlib import Path

from guest import DRIVES


def gdsdirect(*arguments: object) -> tuple[str, str]:
    """Run the installed command; returns what it said on stdout and stderr."""
    script = Path(sys.executable).with_name("gdsdirect")
    done = subprocess.run(
        [script, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_digest_of_a_namespace() -> None:
    drive = DRIVES["data"]
    out, err = gdsdirect("read", drive.generic, "--sha256")
    assert out.strip() == hashlib.sha256(drive.image).hexdigest()
    assert f"{len(drive.image)} bytes by NVME_PASSTHROUGH into host" in err


def test_part_of_a_namespace(tmp_path: Path) -> None:
    """From and to the midst of blocks."""
    drive, output = DRIVES["small"], tmp_path / "part"
    part = ("--offset", 5001, "--size", 300_003, "--output", output)
    out, err = gdsdirect("read", drive.disk, *part)
    assert output.read_bytes() == drive.image[5001:305_004]
    assert out == ""
    assert "300003 bytes by FILE_FIXED into host" in err
    out, err = gdsdirect("read", drive.generic, *part)
    assert output.read_bytes() == drive.image[5001:305_004]
    assert "300003 bytes by NVME_PASSTHROUGH into host" in err
