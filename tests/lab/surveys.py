"""Surveys inside the virtual machine: as root, then as a user who may not, mending what is said.

Not a test itself: tests/test_check_in_lab.py starts it, and judges what it writes to its folder.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdsdirect import DataPath, Target, cli, survey

FOLDER = Path(sys.argv[1])
USER = 1000
DISABLED = Path("/proc/sys/kernel/io_uring_disabled")


def path_of(serial: str) -> str:
    for controller in Path("/sys/class/nvme").iterdir():
        if (controller / "serial").read_text().strip() == serial:
            (disk,) = controller.glob("nvme*n*")
            return f"/dev/{disk.name}"
    raise LookupError(serial)


def command(*arguments: str) -> tuple[int, str]:
    """`gdsdirect check`, in this process, whose modules a user of no rights couldn't read."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = cli.main(["check", *arguments])
    return code, output.getvalue()


def as_user(call: Callable[[], Any]) -> Any:
    """What `call` returns in a child that is nobody in particular."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        os.write(write, json.dumps(call()).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(answer)


def verdict(path: str, way: DataPath, target: Target) -> dict[str, Any]:
    """Of a fresh survey, the only one of its kind."""
    (report,) = survey(path).to_dict()["paths"]
    (one,) = (
        one
        for one in report["verdicts"]
        if (one["way"], one["target"]) == (way.value, target.value)
    )
    return dict(one)


def mended(path: str, target: Target) -> list[dict[str, Any]]:
    """Verdicts of passthrough as an ordinary user, each after the remedy of the one before."""
    found = []
    for _ in range(8):
        one = as_user(lambda: verdict(path, DataPath.NVME_PASSTHROUGH, target))
        found.append(one)
        if one["open"] or not one["remedy"]:
            break
        if subprocess.run(["sh", "-c", one["remedy"]], capture_output=True).returncode != 0:
            break  # it was a sentence, such as on a kernel that lacks what is needed
    return found


def odd_paths() -> dict[str, Any]:
    """Surveys of a file, a partition, and drives that can't be read, each by a name of its own."""
    partition = f"{path_of('far')}p1"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "ext4", "-o", "ro", path_of("files"), folder], check=True)
        found = {"file": survey(f"{folder}/model").to_dict()}
        subprocess.run(["umount", folder], check=True)
    found["partition"] = survey(partition).to_dict()
    for serial in ("broken", "metadata"):
        found[serial] = survey(path_of(serial)).to_dict()
    found["generic"] = survey(path_of("data").replace("nvme", "ng")).to_dict()
    return found


def main() -> None:
    data, far = path_of("data"), path_of("far")
    told: dict[str, Any] = {"data": data, "far": far}
    told["odd"] = odd_paths()
    told["page"] = command()
    told["both"] = command("--json", data, far)
    told["not tried"] = command("--json", "--no-verify", data)
    told["recorded"] = command("--json", "--record", str(FOLDER / "recording"), data, far)
    if DISABLED.exists():
        DISABLED.write_text("2\n")
    told["to host"] = mended(data, Target.HOST)
    if DISABLED.exists():
        DISABLED.write_text("2\n")
    told["to peer"] = mended(data, Target.PEER)
    (FOLDER / "surveys.json").write_text(json.dumps(told))


main()
