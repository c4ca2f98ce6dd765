"""`gdsdirect read` and `gdsdirect bench` of real drives."""

import hashlib
import json
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


def test_a_namespace_is_measured_and_not_written_to(tmp_path: Path) -> None:
    drive, table = DRIVES["small"], tmp_path / "out.json"
    short = ("--seconds", 0.1, "--rounds", 1, "--depths", "1,4", "--block-sizes", "4K,6K,1M,8M")
    out, _ = gdsdirect("bench", drive.generic, *short, "--json", table)
    told = json.loads(table.read_text())
    assert (told["path"], told["size"]) == (str(drive.generic), len(drive.image))
    assert [(cell["way"], cell["block_size"], cell["depth"]) for cell in told["cells"]] == [
        ("nvme_passthrough", 4096, 1),
        ("nvme_passthrough", 4096, 4),
    ]
    assert all(cell["iops"] > 100 for cell in told["cells"])
    assert [(each["block_size"], each["why"]) for each in told["refused"]] == [
        (6 << 10, "direct reads of it are multiples of 4096 bytes"),
        (1 << 20, "one read brings 131072 bytes at most"),
        (8 << 20, f"the path has no more than {len(drive.image)} bytes"),
    ]
    assert {each["way"] for each in told["closed"]} == {
        *("file_fixed", "file_direct", "cufile", "buffered")
    }
    assert "FILE_FIXED is closed: a namespace's character device is read by passthrough" in out
    assert drive.disk.read_bytes() == drive.image


def test_the_node_of_a_drive_is_no_place_for_figures() -> None:
    drive = DRIVES["small"]
    script = Path(sys.executable).with_name("gdsdirect")
    done = subprocess.run(
        [script, "bench", drive.generic, "--json", drive.disk], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"gdsdirect: --json {drive.disk} is a block device: give a file\n"
    assert drive.disk.read_bytes() == drive.image
