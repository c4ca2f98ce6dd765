"""`gdsdirect check` on real kernels and emulated drives: what it says, and that it is so."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from support import needs_lab
from test_in_lab import file_system, partitioned

import lab
from gdsdirect import DataPath, Target
from gdsdirect.host import Host, read_answers
from gdsdirect.survey import survey_host
from gdsdirect.sysfs import Sysfs
from lab import Drive

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
PEER_WAYS = ("nvme_passthrough", "file_direct")
FILE_WAYS = ["file_direct", "file_fixed", "buffered"]


def drives(folder: Path) -> list[Drive]:
    """Peer memory, a drive that shares its switch, one that doesn't; and some that are odd."""
    for serial in ("data", "far", "broken"):
        (folder / serial).write_bytes(random.Random(serial).randbytes(4 * MIB))
    return [
        Drive("peer", size=MIB, peer_memory=64 * MIB, nsid=7),
        Drive("data", contents=folder / "data", nsid=3, block_size=4096),
        Drive("far", contents=partitioned(folder / "far"), own_root_port=True),
        Drive("files", contents=file_system(folder)),
        Drive("broken", contents=folder / "broken", read_errors=(3,)),
        Drive("metadata", size=520 * 4096, metadata=8),
    ]


def verdicts(answer: Any, path: str, target: Target) -> dict[str, Any]:
    """Of one path, by way."""
    (report,) = (report for report in answer["paths"] if report["path"] == path)
    return {one["way"]: one for one in report["verdicts"] if one["target"] == target.value}


def summary(answer: Any) -> list[Any]:
    keys = ("way", "target", "provider", "open", "verified", "closed_by")
    return [[one[key] for key in keys] for report in answer["paths"] for one in report["verdicts"]]


@pytest.mark.lab
@needs_lab("mkfs.ext4")
@pytest.mark.parametrize(("kernel", "peer_memory"), [("6.1", 0), ("6.12", 0), ("7", 1)])
def test_check_in_the_lab(
    kernel: str, peer_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parent)  # seen in the guest, as pytest's own folders are not
    result = lab.run(
        [sys.executable, "-P", str(HERE / "lab/surveys.py"), str(tmp_path)],
        kernel=kernel,
        drives=drives(tmp_path),
        share=tmp_path,
        timeout=120,
    )
    print(result.output)
    assert result.status == 0
    assert result.kernel_problems == ()
    told = json.loads((tmp_path / "surveys.json").read_text())
    code, text = told["both"]
    both = json.loads(text)
    assert code == 1, "no direct way to the drive on a root port of its own"
    check_page(told, peer_memory)
    check_into_peer(told, both, peer_memory)
    check_into_host(told, both)
    check_not_tried(told, peer_memory)
    check_odd_paths(told["odd"], peer_memory)
    check_remedies(told, kernel, peer_memory)
    recorded = json.loads(told["recorded"][1])
    folder = str(tmp_path / "recording")
    again = survey_host(Host(Sysfs(folder), read_answers(folder)), [], True)
    assert summary(again.to_dict()) == summary(recorded) == summary(both)
    into_bar = [read for read in result.trace if read.addresses and read.addresses[0][0] >> 31]
    assert bool(into_bar) == peer_memory, "the drives' own word"


def check_page(told: Any, peer_memory: bool) -> None:
    code, page = told["page"]
    assert code == (0 if peer_memory else 1)
    assert f"{told['data']}: NVMe namespace, QEMU NVMe Ctrl" in page
    assert ("open, verified  NVME_PASSTHROUGH into peer memory of" in page) == peer_memory


def check_into_peer(told: Any, both: Any, peer_memory: bool) -> None:
    near = verdicts(both, told["data"], Target.PEER)
    distant = verdicts(both, told["far"], Target.PEER)
    for way in PEER_WAYS:
        if not peer_memory:
            assert "kernel.p2pdma" in near[way]["closed_by"]
            assert "without P2PDMA" in near[way]["why"]
            assert "CONFIG_PCI_P2PDMA=y" in near[way]["remedy"]
            continue
        assert (near[way]["open"], near[way]["verified"]) == (True, True)
        assert near[way]["trial"]["ok"]
        assert near[way]["trial"]["nbytes"] == 16384
        assert (distant[way]["open"], distant[way]["closed_by"]) == (False, ["peer.route"])
        assert "share no switch" in distant[way]["why"]
        assert distant[way]["trial"]["ok"] is False, "it was tried all the same"


def check_into_host(told: Any, both: Any) -> None:
    for path in (told["data"], told["far"]):
        for way, one in verdicts(both, path, Target.HOST).items():
            assert (one["open"], one["verified"]) == (True, True), (path, way, one)


def check_not_tried(told: Any, peer_memory: bool) -> None:
    code, text = told["not tried"]
    answer = json.loads(text)
    assert code == (0 if peer_memory else 1)
    found = verdicts(answer, told["data"], Target.PEER)["nvme_passthrough"]
    assert (found["open"], found["verified"], found["trial"]) == (peer_memory, False, None)


def check_odd_paths(odd: Any, peer_memory: bool) -> None:
    file, partition, generic = (odd[name]["paths"][0] for name in ("file", "partition", "generic"))
    assert file["what"].startswith("ext4 on nvme")
    assert partition["what"].startswith("block device nvme")
    # A file and a partition are read as files; the far drive reaches no peer memory.
    for name, into_peer in (("file", peer_memory), ("partition", False)):
        path = odd[name]["paths"][0]["path"]
        peer = verdicts(odd[name], path, Target.PEER)
        assert (peer["file_direct"]["open"], peer["file_direct"]["verified"]) == (into_peer,) * 2
        assert "path.namespace" in peer["nvme_passthrough"]["closed_by"]
        host = verdicts(odd[name], path, Target.HOST)
        assert [way for way, one in host.items() if one["verified"]] == FILE_WAYS
    (extents,) = (one for one in file["checks"] if one["name"] == "path.extents")
    assert extents["status"] == "ok"
    # A generic device takes commands and nothing else.
    host = verdicts(odd["generic"], generic["path"], Target.HOST)
    assert [way for way, one in host.items() if one["verified"]] == ["nvme_passthrough"]
    assert host["buffered"]["closed_by"] == ["path.direct"]
    # One that can't be read is not open, whatever the facts say.
    (broken,) = odd["broken"]["paths"]
    assert odd["broken"]["exit_code"] == 2
    for one in verdicts(odd["broken"], broken["path"], Target.HOST).values():
        assert (one["open"], one["closed_by"]) == (False, ["trial"])
        assert "pread of" in one["why"]
    # The kernel keeps metadata to itself; who sends commands would have to take it.
    (metadata,) = odd["metadata"]["paths"]
    host = verdicts(odd["metadata"], metadata["path"], Target.HOST)
    assert "bytes of metadata" in host["nvme_passthrough"]["why"]
    assert [way for way, one in host.items() if one["verified"]] == FILE_WAYS


def check_remedies(told: Any, kernel: str, peer_memory: bool) -> None:
    """Each remedy, done as it is printed, takes away what it is for, until the way is open."""
    to_host = told["to host"]
    reasons = [one["closed_by"][:1] for one in to_host]
    if kernel == "6.1":
        # It has no such setting, and wants CAP_SYS_ADMIN whatever the node's mode.
        assert reasons == [["nvme.node"], ["nvme.node"]]
        assert to_host[-1]["remedy"] == "run it as root, or boot Linux 6.2 or later"
        return
    assert reasons == [["kernel.io_uring"], ["nvme.node"], []]
    assert "kernel.io_uring_disabled is 2" in to_host[0]["why"]
    assert to_host[0]["remedy"] == "sysctl -w kernel.io_uring_disabled=0"
    assert "may not read" in to_host[1]["why"]
    assert (to_host[2]["open"], to_host[2]["verified"]) == (True, True)
    to_peer = told["to peer"]
    if peer_memory:
        assert to_peer[-1]["verified"]
        assert {name for one in to_peer for name in one["closed_by"]} == {
            "kernel.io_uring",
            "peer.memory",
        }
    else:
        assert to_peer[0]["closed_by"][0] == "kernel.p2pdma"
        assert DataPath(to_peer[0]["way"]) is DataPath.NVME_PASSTHROUGH
