"""The first minutes of a stranger with an installed wheel: README's first example, check and bench.

Run by the interpreter that the wheel is installed for: `python -P tests/wheel/first_minutes.py`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
MOST_SECONDS = 0.030  # that the import may take
COMMAND = Path(sys.executable).with_name("gdsdirect")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.stderr == "", done.stderr
    return done


def seconds(code: str) -> float:
    """Processor time of an interpreter that runs `code`: the least of some, for others disturb."""

    def once() -> float:
        arguments = [sys.executable, "-P", "-c", code]
        _, status, used = os.wait4(os.posix_spawn(sys.executable, arguments, os.environ), 0)
        assert status == 0
        return used.ru_utime + used.ru_stime

    return min(once() for _ in range(40))


def check_first_example(path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)[0]
    assert "/data/model" in code
    done = run(sys.executable, "-P", "-c", code.replace("/data/model", str(path)))
    assert re.fullmatch(r"1048576 [A-Z_]+ .+\n", done.stdout), done.stdout
    print(done.stdout, end="")


def check_commands(path: Path) -> None:
    done = run(COMMAND, "check", path)
    assert done.returncode in (0, 1), done.stdout
    assert "open, verified" in done.stdout, done.stdout
    print(done.stdout)
    done = run(COMMAND, "bench", path, "--seconds", "0.1", "--rounds", "1")
    assert done.returncode == 0, done.stdout
    print(done.stdout)


def check_import_time() -> None:
    bare, imported = seconds("pass"), seconds("import gdsdirect")
    print(f"import gdsdirect: {1000 * (imported - bare):.1f} ms over {1000 * bare:.1f} ms")
    assert imported - bare < MOST_SECONDS


with tempfile.TemporaryDirectory() as folder:
    model = Path(folder, "model")
    model.write_bytes(os.urandom(1 << 20) * 24)
    check_first_example(model)
    check_commands(model)
check_import_time()
