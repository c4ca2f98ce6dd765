"""Verdicts: which way is open to a path, by its facts and by a read that is tried."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gdsdirect.check import Check, Status, Target, Trial, Verdict
from gdsdirect.checks.nvidia import Nvidia
from gdsdirect.checks.nvme import Drive, block_format, node, transport
from gdsdirect.checks.paths import PathFacts
from gdsdirect.checks.peer import Provider, memory, route
from gdsdirect.host import Host, numbers, texts
from gdsdirect.stream import DataPath
from gdsdirect.trial import try_read

# Facts that a read can disprove: the kernel's own list of host bridges can be longer than ours.
_TRIED_ALL_THE_SAME = frozenset({"peer.route"})

_RING = ("kernel.io_uring", "kernel.big_entries")
_FEATURES = {
    DataPath.NVME_PASSTHROUGH: (*_RING, "kernel.passthrough"),
    DataPath.FILE_DIRECT: _RING,
    DataPath.FILE_FIXED: (*_RING, "kernel.fixed_buffers"),
    DataPath.BUFFERED: _RING,
}


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What verdicts need of the host: checks of the kernel and of peer memory by name, and more."""

    checks: dict[str, Check]
    providers: tuple[Provider, ...]
    nvidia: Nvidia


def judge(host: Host, facts: HostFacts, path: PathFacts, verify: bool) -> tuple[Verdict, ...]:
    """A verdict for each way to a path, into each kind of memory."""
    found = []
    lending = tuple(provider for provider in facts.providers if provider.size)
    for provider in lending or (None,):
        into_peer = _into_peer(host, facts, path, provider)
        for way in (DataPath.NVME_PASSTHROUGH, DataPath.FILE_DIRECT):
            needed = [*into_peer, *_by(host, facts, path, way)]
            found.append(_verdict(host, path, way, Target.PEER, provider, needed, verify))
    found.append(_cufile(facts, path))
    for way in _FEATURES:
        needed = _by(host, facts, path, way)
        found.append(_verdict(host, path, way, Target.HOST, None, needed, verify))
    return tuple(found)


def _by(host: Host, facts: HostFacts, path: PathFacts, way: DataPath) -> list[Check]:
    """What a way needs, whatever it leads into."""
    needed = [facts.checks[name] for name in _FEATURES[way]]
    if way is not DataPath.NVME_PASSTHROUGH:
        # That a character device isn't read as a file is said by path.direct.
        buffered = way is DataPath.BUFFERED and path.kind != "char"
        return needed + path.named("path.open", *(() if buffered else ("path.direct",)))
    if path.namespace is not None:
        return [*needed, node(host, path.namespace), block_format(host, path.namespace)]
    return needed + path.named("path.open", "path.namespace", "nvme.namespaces")


def _into_peer(
    host: Host, facts: HostFacts, path: PathFacts, provider: Provider | None
) -> list[Check]:
    """What reading into peer memory needs: of the kernel, the provider and the drives."""
    needed = [facts.checks["kernel.p2pdma"]]
    if provider is None:
        needed.append(facts.checks["peer.providers"])
    else:
        needed.append(memory(host, provider))
    needed += path.named("path.drives", "nvme.namespaces")
    for drive in path.drives:
        needed.append(transport(drive))
        if provider is not None and drive.pci_address is not None:
            needed.append(route(host, drive.pci_address, provider))
    return needed


def _because(closing: Sequence[Check]) -> tuple[str, tuple[str, ...], str | None]:
    """Why checks close a way, their names, and the first remedy that there is."""
    why = "; ".join(dict.fromkeys(one.why for one in closing))
    names = tuple(dict.fromkeys(one.name for one in closing))
    return why, names, next((one.remedy for one in closing if one.remedy), None)


def _verdict(
    host: Host,
    path: PathFacts,
    way: DataPath,
    target: Target,
    provider: Provider | None,
    needed: Iterable[Check],
    verify: bool,
) -> Verdict:
    address = provider.address if provider else None
    closing = [one for one in needed if one.status is Status.MISSING]
    why, names, remedy = _because(closing)
    hard = [one for one in closing if one.name not in _TRIED_ALL_THE_SAME]
    untried = _why_untried(path, way, provider) if verify else "trials were left out"
    trial = None if hard or untried else _try(host, path, way, target, provider)
    if trial is None and closing:
        return Verdict(way, target, False, why, address, closed_by=names, remedy=remedy)
    if trial is None:
        untried = untried or "this is a recording without that read"
        why = f"the facts allow it; not tried, since {untried}"
        return Verdict(way, target, True, why, address)
    if trial.ok:
        why = f"{trial.nbytes} bytes were read into it, equal to {trial.compared_with}"
        return Verdict(way, target, True, why, address, True, trial)
    reason = f"{why}; tried: {trial.error}" if why else f"tried: {trial.error}"
    return Verdict(way, target, False, reason, address, False, trial, names or ("trial",), remedy)


def _why_untried(path: PathFacts, way: DataPath, provider: Provider | None) -> str | None:
    """What forbids a trial read, or None."""
    if provider is not None and provider.is_gpu:
        # A trial could overwrite CUDA's memory.
        return "which of a GPU's memory is free only its driver knows"
    if way is DataPath.NVME_PASSTHROUGH:
        return None if path.namespace else "no namespace is known"
    if path.kind == "folder":
        return f"{path.path} is a folder"
    if path.kind == "file" and path.size == 0:
        return f"{path.path} is empty"
    return None if path.kind in ("file", "block") else "no file is known"


def _try(
    host: Host, path: PathFacts, way: DataPath, target: Target, provider: Provider | None
) -> Trial | None:
    source, plain = _sources(host, path, way)
    allocate = provider.allocate if provider else None
    where = provider.address if provider else target.value
    question = f"read {source} {way.value} {where}"
    answer = host.ask(question, lambda: try_read(way, source, plain, allocate))
    if not isinstance(answer, dict):
        return None
    return Trial(
        ok=answer.get("ok") is True,
        nbytes=numbers(answer).get("nbytes", 0),
        compared_with=texts(answer).get("compared_with"),
        error=texts(answer).get("error"),
    )


def _sources(host: Host, path: PathFacts, way: DataPath) -> tuple[str, str | None]:
    """What the way reads, and what has the same bytes for a plain read."""
    if way is not DataPath.NVME_PASSTHROUGH or path.namespace is None:
        return path.path, path.path
    drive: Drive = path.namespace
    readable = drive.disk is not None and host.open_error(drive.disk) == 0
    return drive.generic or path.path, drive.disk if readable else None


# ---- cuFile

_CUFILE_NEEDS = (
    "path.open",
    "path.direct",
    "path.drives",
    "path.cufile",
    "nvme.transport",
    "nvme.namespaces",
)


def _cufile(facts: HostFacts, path: PathFacts) -> Verdict:
    """By facts alone: to try it takes a GPU's memory, and a context on that GPU."""
    way, target = DataPath.CUFILE, Target.GPU
    path_closing = [
        one
        for one in (*path.checks, *map(transport, path.drives))
        if one.name in _CUFILE_NEEDS and one.status is Status.MISSING
    ]
    modes = {"P2PDMA": Nvidia.P2PDMA, "nvidia-fs": Nvidia.NVIDIA_FS}
    closing = {mode: facts.nvidia.closed_by(names) for mode, names in modes.items()}
    fewest = min(closing, key=lambda mode: len(closing[mode]))
    if not path_closing and not closing[fewest]:
        why = (
            f"the facts allow it, in cuFile's {fewest} mode; not tried: a read into GPU memory "
            "tells"
        )
        return Verdict(way, target, True, why)
    both = [*closing[fewest], *path_closing]
    why, names, remedy = _because(both)
    other = next(mode for mode in closing if mode != fewest)
    if closing[fewest] and "nvidia.driver" not in [one.name for one in closing[fewest]]:
        _, missing, _ = _because(closing[other])
        why = f"{fewest} mode: {why}. {other} mode needs {', '.join(missing)}"
    return Verdict(way, target, False, why, closed_by=names, remedy=remedy)
