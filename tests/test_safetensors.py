"""Safetensors files, beside what the safetensors package makes of them."""

import json
import os
import struct
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support import needs_torch, run_python

import gdsdirect
from gdsdirect import DataPath
from gdsdirect.safetensors import SafetensorsError, load_file, safe_open
from gdsdirect.safetensors.header import BITS
from gdsdirect.safetensors.load import Progress
from gdsdirect.safetensors.slices import select

KNOWN = {
    "BOOL": numpy.bool_,
    "U8": numpy.uint8,
    "I8": numpy.int8,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "I16": numpy.int16,
    "U16": numpy.uint16,
    "F16": numpy.float16,
    "BF16": ml_dtypes.bfloat16,
    "I32": numpy.int32,
    "U32": numpy.uint32,
    "F32": numpy.float32,
    "C64": numpy.complex64,
    "F64": numpy.float64,
    "I64": numpy.int64,
    "U64": numpy.uint64,
}
"""What the arrays are of, by the format's names."""

Spec = tuple[str, str, tuple[int, ...]]
"""A tensor: name, dtype, shape."""


def packed(header: Any, data: bytes = b"", *, padding: int = 0) -> bytes:
    """A file's bytes, the header as it is if it is bytes; else of 8 n + `padding` bytes, as the
    package writes it with 0."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
        header += b" " * (-len(header) % 8 + padding)
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype: str, shape: Any, begin: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def contents(specs: Iterable[Spec], *, padding: int = 0, **metadata: str) -> bytes:
    """A file with these tensors, of bytes that are not like each other's."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in specs:
        begin, end = end, end + int(numpy.prod(shape, dtype=object)) * BITS[dtype] // 8
        header[name] = entry(dtype, list(shape), begin, end)
    data = bytearray(numpy.random.default_rng(end).integers(0, 256, end, numpy.uint8))
    for name, dtype, _ in specs:
        if dtype == "BOOL":
            begin, stop = header[name]["data_offsets"]
            data[begin:stop] = bytes(byte & 1 for byte in data[begin:stop])
    return packed(header, bytes(data), padding=padding)


def same(found: Any, wanted: dict[str, Any]) -> None:
    """`wanted` is what the safetensors package says: shape, dtype and bytes."""
    assert tuple(found.shape) == tuple(wanted["shape"])
    assert found.dtype == numpy.dtype(KNOWN[wanted["dtype"]])
    assert found.tobytes() == bytes(wanted["data"])
    assert found.flags.aligned
    assert found.flags.writeable


SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (0,), (3, 5), (2, 0, 4), (2, 3, 4, 5), (4097,)]

CORPUS: dict[str, bytes] = {
    "nothing": packed({}),
    "metadata alone": contents([], format="pt", **{"": "empty"}),
    "an empty tensor": contents([("e", "F32", (0, 3))]),
    "empty tensors among others": contents(
        [("a", "F32", (0,)), ("b", "U8", (5,)), ("c", "F64", (2, 0)), ("d", "U8", (1,))]
    ),
    "a scalar": contents([("s", "F64", ())]),
    "odd names": contents(
        [(name, "U8", (3,)) for name in ("", " ", "ü€", '"\\', "a.b/c", "__m__")]
    ),
    "a name before the metadata's": packed(
        {"z": entry("U8", [1], 1, 2), "a": entry("U8", [1], 0, 1), "__metadata__": {"k": "v"}},
        b"xy",
    ),
    "a field of the future": packed({"a": entry("U8", [1], 0, 1, later=[{}])}, b"x"),
    "no metadata, by null": packed({"__metadata__": None}),
    "more than a page of names": contents([(f"tensor.{i}", "F16", (i,)) for i in range(300)]),
    "10,000 tensors": contents([(f"layers.{i}.weight", "F32", (2, 3)) for i in range(10_000)]),
    "large": contents([("w", "F32", (1 << 20,)), ("v", "F16", (3, 1 << 18)), ("u", "U8", (5,))]),
    **{
        f"{dtype}, a header of 8n + {padding}": contents(
            [(f"{i}", dtype, shape) for i, shape in enumerate(SHAPES)], padding=padding
        )
        for dtype in KNOWN
        for padding in (0, 1, 3)
    },
    # What is of several bytes begins at an odd place.
    **{
        f"{dtype} behind a byte": contents([("byte", "U8", (1,)), ("it", dtype, (5, 3))])
        for dtype in KNOWN
    },
}


@pytest.fixture(params=[True, False, None], ids=["direct", "cached", "either"])
def direct(request: pytest.FixtureRequest) -> bool | None:
    chosen: bool | None = request.param
    return chosen


@pytest.mark.parametrize("name", CORPUS)
def test_all_that_the_package_reads(name: str, tmp_path: Path, direct: bool | None) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(CORPUS[name])
    wanted = dict(safetensors.deserialize(CORPUS[name]))
    tensors = load_file(path, direct=direct)
    assert tensors.keys() == wanted.keys()
    with (
        safe_open(path, direct=direct) as ours,
        safetensors.safe_open(path, "np") as theirs,
    ):
        assert tensors.metadata == ours.metadata() == (theirs.metadata() or {})
        assert ours.keys() == theirs.offset_keys()
        some = ours.keys()[:: max(1, len(wanted) // 50)]
        for key in some:
            same(ours.get_tensor(key), wanted[key])
            assert ours.get_slice(key).get_shape() == list(wanted[key]["shape"])
            assert ours.get_slice(key).get_dtype() == wanted[key]["dtype"]
    for key, array in tensors.items():
        same(array, wanted[key])


def test_what_the_package_writes(tmp_path: Path) -> None:
    made = {
        "a": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "b": numpy.array([True, False]),
        "c": numpy.zeros((0, 2), numpy.int64),
    }
    safetensors.numpy.save_file(made, tmp_path / "file", {"who": "the package"})
    found = load_file(tmp_path / "file")
    assert found.keys() == made.keys()
    for name, array in made.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert (found[name] == array).all()
    assert found.metadata == {"who": "the package"}


# ---- Headers


U8 = entry("U8", [1], 0, 1)

BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it has 0 bytes"),
    "no length": (b"1234567", "it has 7 bytes"),
    "no header": (struct.pack("<Q", 0), "doesn't begin with a brace"),
    "a longer header": (
        struct.pack("<Q", 100) + b"{}",
        "would have 100 bytes, and the file has 10",
    ),
    "an endless header": (struct.pack("<Q", 2**64 - 1) + b"{}", "at most 100000000 are read"),
    "half a header": (struct.pack("<Q", 1) + b"{", "no JSON"),
    "spaces first": (packed(b"  {}"), "doesn't begin with a brace"),
    "a list": (packed(b"[]"), "doesn't begin with a brace"),
    "no UTF-8": (packed(b'{"\xff":{}}'), "not UTF-8 at byte 2"),
    "something behind": (packed(b"{}\0\0"), "no JSON"),
    "NaN": (packed(b'{"a":NaN}'), "NaN is no JSON"),
    "nested": (packed(b'{"a":' + b"[" * 200_000), "nested too deeply|no JSON"),
    "long numbers": (packed(b'{"a":' + b"9" * 100_000 + b"}"), "no JSON"),
    "a name twice": (packed(b'{"a":1,"a":1}'), "'a' is there twice"),
    "a field twice": (packed(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' is there twice"),
    "metadata twice": (packed(b'{"__metadata__":{"k":"","k":""}}'), "'k' is there twice"),
    "metadata of numbers": (packed({"__metadata__": {"k": 1}}), "no map of strings"),
    "metadata as a list": (packed({"__metadata__": []}), "no map of strings"),
    "half a character": (
        packed(b'{"\\ud800":' + json.dumps(U8).encode() + b"}", b"x"),
        "surrogate",
    ),
    "no tensor": (packed({"a": 1}), "tensor 'a' has not all of data_offsets, dtype, shape"),
    "no shape": (packed({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "has not all of"),
    "an unknown dtype": (
        packed({"a": entry("F128", [1], 0, 16)}, b"x" * 16),
        "dtype 'F128', which",
    ),
    "a dtype that is a list": (packed({"a": entry([], [1], 0, 1)}, b"x"), r"the dtype \[\]"),
    "a shape that is a number": (packed({"a": entry("U8", 1, 0, 1)}, b"x"), "the shape 1"),
    "a negative length": (packed({"a": entry("U8", [-1], 0, 1)}, b"x"), r"the shape \[-1\]"),
    "a length that is true": (packed({"a": entry("U8", [True], 0, 1)}, b"x"), r"shape \[True\]"),
    "a length in parts": (packed({"a": entry("U8", [1.0], 0, 1)}, b"x"), r"the shape \[1.0\]"),
    "a length too long": (packed({"a": entry("U8", [2**64], 0, 1)}, b"x"), "the shape"),
    "too many bytes": (packed({"a": entry("U8", [2**63, 4], 0, 1)}, b"x"), r"more than 2\*\*64"),
    "a million lengths": (packed({"a": entry("U8", [2**63] * 10**6, 0, 1)}, b"x"), r"2\*\*64"),
    "three offsets": (packed({"a": {**U8, "data_offsets": [0, 1, 1]}}, b"x"), "the data_offsets"),
    "a negative offset": (packed({"a": entry("U8", [1], -1, 0)}, b"x"), "the data_offsets"),
    "offsets turned round": (packed({"a": entry("U8", [1], 1, 0)}, b"x"), "-1 by its offsets"),
    "fewer bytes than its shape": (
        packed({"a": entry("F32", [1], 0, 3)}, b"xxx"),
        "has 4 bytes by",
    ),
    "parts of bytes": (packed({"a": entry("F4", [3], 0, 2)}, b"xx"), "12 bits, which are no whole"),
    "a gap": (packed({"a": entry("U8", [1], 1, 2)}, b"xx"), "has bytes of none before it"),
    "an overlap": (
        packed({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"xxx"),
        "'b' begins at byte [0-9]+, not at [0-9]+: overlaps another",
    ),
    "the same bytes": (packed({"a": U8, "b": U8}, b"x"), "overlaps another"),
    "nothing, beyond": (packed({"a": U8, "b": entry("U8", [0], 5, 5)}, b"x"), "begins at byte"),
    "a file too short": (packed({"a": entry("U8", [3], 0, 3)}, b"xx"), "more than it has"),
    "a file too long": (packed({"a": U8}, b"xx"), "bytes behind them of no tensor"),
    "offsets beyond all": (packed({"a": entry("U8", [2**62], 0, 2**62)}, b"x"), "more than it has"),
}

STRICTER = {"spaces first", "a name twice", "metadata twice"}
"""What the package takes: the format's description forbids the first, and of a name that is there
twice it keeps one, who knows which."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_header_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    whole, reason = BROKEN[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(whole)
    for call in (load_file, safe_open):
        with pytest.raises(SafetensorsError, match=reason) as told:
            call(path)
        assert str(path) in str(told.value)
        assert len(str(told.value)) < 1000 or "shape" in reason
    if name not in STRICTER and "twice" not in reason:
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(whole)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file"


SMALL = st.integers(0, 3) | st.sampled_from([-1, 2**63, 2**64, True, 1.5, None, "1"])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "ü"]),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["U8", "F16", "F4", "x"]),
                "shape": st.lists(SMALL, max_size=2),
                "data_offsets": st.lists(SMALL, min_size=2, max_size=2),
            }
        )
        | st.none()
        | st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2),
        max_size=3,
    ),
    st.binary(max_size=4),
)
def test_headers_are_judged_as_the_package_judges_them(
    scratch: Path, header: Any, data: bytes
) -> None:
    whole = packed(header, data)
    try:
        wanted: set[str] | None = set(dict(safetensors.deserialize(whole)))
    except safetensors.SafetensorError:
        wanted = None
    scratch.write_bytes(whole)
    try:
        with safe_open(scratch) as ours:
            assert set(ours.keys()) == wanted
    except SafetensorsError:
        assert wanted is None


def test_a_file_that_becomes_shorter_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "U8", (100_000,))]))
    with safe_open(path) as tensors:
        tensors.get_slice("a")[:1]
        os.truncate(path, 50_000)
        with pytest.raises(SafetensorsError, match="became shorter"):
            tensors.get_tensor("a")


def test_a_file_that_is_replaced_is_told(tmp_path: Path, direct: bool | None) -> None:
    """Its bytes would be taken for what the other one's header says."""
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(contents([("a", "U8", (1000,))]))
    other.write_bytes(contents([("b", "U8", (1000,))]))
    with safe_open(path, direct=direct) as tensors:
        other.replace(path)
        with pytest.raises(SafetensorsError, match="was changed after its header was read"):
            tensors.get_tensor("a")


def test_threads_share_what_is_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([(str(number), "U8", (5000,)) for number in range(64)]))
    wanted = load_file(path)
    with safe_open(path) as tensors, ThreadPoolExecutor(8) as pool:
        for name, found in zip(wanted, pool.map(tensors.get_tensor, wanted), strict=True):
            assert (found == wanted[name]).all()
        assert tensors.read is not None
        assert tensors.read.nbytes == 64 * 5000


@pytest.mark.parametrize("missing", ["file.safetensors", "file.index.json"])
def test_no_file(missing: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=missing):
        load_file(tmp_path / missing)


# ---- Slices


INDICES: tuple[Any, ...] = (
    *(0, -1, slice(None), slice(1, 3), slice(None, None, 2), slice(5, 5), slice(2, 100), ...),
    *((1, 2), (slice(None), 1), (slice(1, 3), slice(2, 4)), (..., slice(1, 2)), (0, ..., 0), ()),
    *((slice(None), slice(None, None, 3)), (slice(3, 1), 0), (slice(0, 4, 3), 1, slice(1, 3))),
)


@pytest.fixture(scope="module")
def sliced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("sliced") / "model.safetensors"
    shapes: list[tuple[int, ...]] = [(), (9,), (6, 7), (4, 5, 6), (3, 4, 5000), (0, 4), (4, 9000)]
    path.write_bytes(
        contents([(str(i), "I16", shape) for i, shape in enumerate(shapes)], padding=1)
    )
    return path, load_file(path, direct=False)


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_slices_are_numpys(
    index: Any, sliced: tuple[Path, dict[str, Any]], direct: bool | None
) -> None:
    path, whole = sliced
    with safe_open(path, direct=direct) as tensors:
        for name, array in whole.items():
            try:
                wanted = array[index]
            except IndexError:
                with pytest.raises(IndexError):
                    tensors.get_slice(name)[index]
                continue
            found = tensors.get_slice(name)[index]
            assert found.shape == wanted.shape
            assert (found == wanted).all()


lengths = st.lists(st.integers(0, 6), max_size=4)
bounds = st.none() | st.integers(-8, 8)
parts = st.integers(-7, 7) | st.builds(slice, bounds, bounds, st.none() | st.integers(1, 3))


@settings(max_examples=500, deadline=None)
@given(lengths, st.lists(parts | st.just(...), max_size=5), st.sampled_from([1, 2, 8, 4096, 8192]))
def test_a_selection_has_the_bytes_of_the_index(
    shape: list[int], index: list[Any], itemsize: int
) -> None:
    """Elements are numbers of 8 bytes here; what counts is which ones."""
    whole = numpy.arange(int(numpy.prod(shape, dtype=object))).reshape(shape)
    try:
        wanted = whole[tuple(index)]
    except IndexError:
        with pytest.raises(IndexError):
            select(shape, itemsize, tuple(index))
        return
    starts, nbytes, read, left = select(shape, itemsize, tuple(index))
    flat = whole.reshape(-1)
    runs = [flat[start // itemsize : (start + nbytes) // itemsize] for start in starts]
    came = numpy.concatenate([numpy.empty(0, whole.dtype), *runs]).reshape(read)
    assert came[left].shape == wanted.shape
    assert (came[left] == wanted).all()
    # No more than whole rows from the first to the last.
    assert sum(map(len, runs)) <= whole.size
    if wanted.size and nbytes >= 4096 and len(starts) > 1:
        assert came.size == wanted.size


@pytest.mark.parametrize(
    ("index", "error"),
    [
        (slice(None, None, -1), ValueError),
        ("a", TypeError),
        (None, TypeError),
        (True, TypeError),
        (1.0, TypeError),
        ([0, 1], TypeError),
        (9, IndexError),
        ((0, 0), IndexError),
        ((..., ...), IndexError),
    ],
    ids=str,
)
def test_what_is_no_index(index: Any, error: type[Exception], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "U8", (9,)), ("f4", "F4", (4,))]))
    with safe_open(path) as tensors:
        with pytest.raises(error):
            tensors.get_slice("a")[index]
        with pytest.raises(TypeError, match="no whole bytes"):
            tensors.get_slice("f4")[0]
        with pytest.raises(KeyError, match="b"):
            tensors.get_slice("b")


def test_a_slice_reads_not_much_more_than_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "U8", (100, 1 << 16))]))
    for index, nbytes in ((slice(3, 5), 2 << 16), ((slice(None), slice(0, 8192)), 100 * 8192)):
        with safe_open(path, direct=False) as tensors:
            tensors.get_slice("a")[index]
            assert tensors.read is not None
            assert tensors.read.nbytes == nbytes


# ---- Ways


def test_the_way_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "F32", (1 << 20,)), ("b", "U8", (3,))]))
    size = (4 << 20) + 3
    cached = load_file(path)  # written a moment ago
    assert cached.reads[str(path)].path is DataPath.BUFFERED
    with gdsdirect.open(path) as file:
        best = file.read_into(bytearray(1 << 20), size=4096).path is not DataPath.BUFFERED
    past = load_file(path, direct=True).reads[str(path)]
    assert past.nbytes == size
    assert (past.path is not DataPath.BUFFERED) == best
    if best:  # all but the ends, of less than a page each
        assert past.bounce_bytes < 8192
        os.sync()
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        assert load_file(path).reads[str(path)].path is past.path
    with safe_open(path, direct=True) as tensors:
        assert tensors.read is None
        tensors.get_tensor("a")
        tensors.get_tensor("b")
        assert tensors.read is not None
        assert (tensors.read.nbytes, sum(tensors.read.ways.values())) == (size, size)


def test_nothing_is_copied_that_is_aligned(tmp_path: Path) -> None:
    """All of a file's tensors are in one piece of memory, which lives as long as one of them."""
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "F64", (100,)), ("b", "F32", (100,)), ("c", "U8", (1,))]))
    tensors = load_file(path)
    first, second, third = (tensors[name].ctypes.data for name in "abc")
    assert second - first == 800
    assert third - second == 400
    wanted = tensors["b"].tobytes()
    last = tensors.pop("b")
    del tensors
    assert last.tobytes() == wanted


def test_memory_is_given_back(tmp_path: Path) -> None:
    """With the last array, and no ring or descriptor stays while there is one."""
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "U8", (64 << 20,))]))
    script = f"""
import os
from gdsdirect.safetensors import load_file

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

load_file({str(path)!r})
before, files = now(), len(os.listdir("/proc/self/fd"))
for direct in (True, False) * 4:
    tensors = load_file({str(path)!r}, direct=direct)
    assert len(os.listdir("/proc/self/fd")) == files
    assert now() - before > 60 << 20
    del tensors
assert now() - before < 16 << 20, now() - before
"""
    run_python(script)


# ---- Progress


@pytest.mark.parametrize("name", ["nothing", "large", "10,000 tensors"])
def test_progress_is_told_to_whom_it_is_given(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CORPUS[name])
    told: list[tuple[int, int]] = []
    progress: Progress = lambda done, total: told.append((done, total))  # noqa: E731
    load_file(path, progress=progress)
    total = sum(len(each["data"]) for _, each in safetensors.deserialize(CORPUS[name]))
    assert [done for done, _ in told] == ([total] if total else [])
    assert {each for _, each in told} <= {total}


def test_no_bar_without_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(CORPUS["large"])
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"a bar needs Rich: pip install gdsdirect\[cli\]"):
        load_file(tmp_path / "file", progress=True)


def test_a_bar_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.safetensors").write_bytes(CORPUS["large"])
    load_file(tmp_path / "model.safetensors", progress=True)
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown
    assert "MB" in shown or "MiB" in shown


# ---- Checkpoints


def checkpoint(folder: Path, weight_map: Any) -> Path:
    (folder / "one.safetensors").write_bytes(
        contents([("a", "F32", (3,)), ("b", "U8", (2,))], k="1")
    )
    (folder / "two.safetensors").write_bytes(contents([("c", "I64", (2, 2))], l="2"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 46}, "weight_map": weight_map}))
    return index


ONE, TWO = "one.safetensors", "two.safetensors"


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, {"c": TWO, "a": ONE, "b": ONE})
    told: list[int] = []
    tensors = load_file(index, progress=lambda done, total: told.append(done))
    assert tensors.keys() == {"a", "b", "c"}
    assert set(tensors.reads) == {str(tmp_path / ONE), str(tmp_path / TWO)}
    assert tensors.metadata == {"k": "1", "l": "2"}
    assert sorted(told)[-1] == 46
    for name in (ONE, TWO):
        for key, wanted in safetensors.deserialize((tmp_path / name).read_bytes()):
            same(tensors[key], wanted)
    with safe_open(index) as some:
        assert some.keys() == ["c", "a", "b"]
        assert some.metadata() == tensors.metadata
        assert (some.get_slice("c")[1:] == tensors["c"][1:]).all()


def test_what_the_index_leaves_out_is_left_out(tmp_path: Path) -> None:
    assert load_file(checkpoint(tmp_path, {"a": ONE})).keys() == {"a"}


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"a": "../one.safetensors"}, "name files that lie beside it"),
        ({"a": "/one.safetensors"}, "name files that lie beside it"),
        ({"a": ".."}, "name files that lie beside it"),
        ({"a": 1}, "name files that lie beside it"),
        ({"a": TWO}, "says that two.safetensors has 'a', and it has not"),
        (None, "no index of a checkpoint"),
        (["a"], "no index of a checkpoint"),
    ],
    ids=str,
)
def test_a_broken_index(weight_map: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match=reason):
        load_file(checkpoint(tmp_path, weight_map))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b"[" * 200_000, b"1"], ids=repr)
def test_no_index(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(SafetensorsError, match="no index of a checkpoint"):
        load_file(tmp_path / "index.json")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, {"a": ONE, "x": "three.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"three\.safetensors"):
        load_file(index)


# ---- Frameworks


def test_a_dtype_that_numpy_has_not(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", "U8", (2,)), ("f", "F6_E2M3", (4,))]))
    with pytest.raises(TypeError, match="NumPy has no F6_E2M3"):
        load_file(path)
    with safe_open(path) as tensors:
        assert tensors.get_tensor("a").nbytes == 2
        assert tensors.get_slice("f").get_dtype() == "F6_E2M3"
        with pytest.raises(TypeError, match="NumPy has no F6_E2M3"):
            tensors.get_tensor("f")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_without_ml_dtypes(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(contents([("a", dtype, (2,))]))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=f"NumPy alone has no {dtype}: pip install ml_dtypes"):
        load_file(path)


def test_more_dimensions_than_numpy_has(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(packed({"a": entry("U8", [1] * 65, 0, 1)}, b"x"))
    with pytest.raises(ValueError, match="dimension"):
        load_file(path)


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"framework": "jax"}, ValueError, "framework is 'jax': give one of"),
        ({"device": "tpu:0"}, ValueError, "device is 'tpu:0'"),
        ({"device": "cuda:0", "framework": "numpy"}, ValueError, "NumPy's arrays are on the cpu"),
        ({"framework": "cupy"}, ValueError, "CuPy's arrays are on cuda:0"),
        ({"framework": "cupy", "device": "cuda:x"}, ValueError, "CuPy's arrays are on cuda:0"),
    ],
    ids=str,
)
def test_what_is_no_framework_or_device(
    arguments: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(packed({}))
    with pytest.raises(error, match=reason):
        load_file(tmp_path / "file", **arguments)


@pytest.mark.parametrize("package", ["numpy", "torch", "cupy"])
def test_a_framework_that_is_not_installed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(packed({}))
    monkeypatch.setitem(sys.modules, package, None)
    device = "cpu" if package == "numpy" else "cuda:0"
    with pytest.raises(ImportError, match=f"is not installed: pip install {package}"):
        load_file(tmp_path / "file", device, framework=package)


def test_nothing_is_imported_before_it_is_needed() -> None:
    script = """
import sys
import gdsdirect.safetensors
wrong = {"numpy", "torch", "cupy", "ml_dtypes", "safetensors", "rich", "cuda"} & set(sys.modules)
assert not wrong, wrong
"""
    run_python(script)


TORCH_TYPES = {**dict.fromkeys(KNOWN), "F4": None}


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_TYPES)
def test_torch_has_what_the_package_makes(dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as theirs

    path = tmp_path / "file"
    shapes = [(8,), (3, 6), (0, 2)]
    path.write_bytes(
        contents([(f"{i}", dtype, shape) for i, shape in enumerate(shapes)], padding=1)
    )
    try:
        wanted = theirs(path)
    except (KeyError, AttributeError, safetensors.SafetensorError):
        pytest.skip(f"the package reads no {dtype} into torch {torch.__version__}")
    found = load_file(path, framework="torch")
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8))
    with safe_open(path, "torch") as tensors:
        if dtype != "F4":
            some = tensors.get_slice("1")[:, 1:3].contiguous()
            assert torch.equal(
                some.view(torch.uint8), wanted["1"][:, 1:3].contiguous().view(torch.uint8)
            )
