"""The store's files, names and paths from outside, and safetensors files that lie."""

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eda.adapters.errors import CorruptVersionError, InvalidInputError, StorageFullError, UnknownVersionError
from eda.adapters.store.files import locked_or_raise, require_free_space, write_json_atomically
from eda.adapters.store.manifest import Manifest
from eda.adapters.store.names import AllowedRoots, check_hub_id, check_name
from eda.adapters.store.store import AdapterStore
from eda.adapters.store.tensors import read_header
from tests.adapters.fake_stages import manifest_for, write_weights


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters", [tmp_path / "bundled"])


def publish(store: AdapterStore, name: str = "math", **changes: object) -> Manifest:
    weights = store.root.parent / "weights.safetensors"
    write_weights(weights)
    return store.publish(weights, manifest_for(name, **changes))  # type: ignore[arg-type]


def test_versions_count_up_over_bundled_ones(store: AdapterStore, tmp_path: Path) -> None:
    bundled = AdapterStore(tmp_path / "bundled")
    publish(bundled)
    assert store.versions("math") == [1]
    assert publish(store).version == 2
    assert store.directory("math", 1).is_relative_to(tmp_path / "bundled")
    store.delete("math")
    assert store.versions("math") == [1]
    with pytest.raises(UnknownVersionError, match="has no version 2; there are: 1"):
        store.manifest("math", 2)


def test_what_a_killed_process_leaves_is_not_seen_and_goes(store: AdapterStore) -> None:
    publish(store)
    (store.root / ".unfinished" / "abc").mkdir(parents=True)
    (store.root / ".trash" / "def").mkdir(parents=True)
    (store.root / "math" / "02").mkdir()  # not a version number
    (store.root / "math" / ".2.tmp").mkdir()
    assert store.versions("math") == [1]
    store.clean()
    assert not (store.root / ".unfinished").exists()
    assert not (store.root / ".trash").exists()
    assert [problem.version for problem in store.scan().problems] == ["02"]


def test_what_a_killed_writer_left_goes_with_the_next_version(store: AdapterStore) -> None:
    rubbish = [store.root / ".unfinished" / "abc", store.root / ".trash" / "def"]
    for work in (lambda: publish(store), lambda: store.delete("code")):
        for directory in rubbish:
            directory.mkdir(parents=True)
            (directory / "private.safetensors").write_bytes(b"half")
        work()
        assert not any(directory.exists() for directory in rubbish)
    assert store.versions("math") == [1]
    assert store.scan().problems == []


def test_a_moved_version_is_refused(store: AdapterStore) -> None:
    publish(store)
    os.rename(store.root / "math", store.root / "code")
    with pytest.raises(CorruptVersionError, match="was it moved"):
        store.manifest("code", 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", "1"),
        ("sizes", {"hidden_size": 8}),
        ("sizes", {"hidden_size": 8, "num_features": 24, "intermediate_size": 4, "fc_rank": 0, "depth": 1}),
        ("name", None),
        ("weights_bytes", True),
        ("metrics", []),
    ],
)
def test_a_manifest_names_its_malformed_field(store: AdapterStore, field: str, value: object) -> None:
    publish(store)
    path = store.directory("math", 1) / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CorruptVersionError, match=field):
        store.manifest("math", 1)


def test_publishing_refuses_what_is_no_safetensors_file(store: AdapterStore, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x80\x04\x95pickle")
    with pytest.raises(CorruptVersionError, match="safetensors"):
        store.publish(bad, manifest_for("math"))
    assert store.versions("math") == []
    assert list((store.root / ".unfinished").iterdir()) == []


def lying(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"short", "at least 8"),
        (struct.pack("<Q", 2**62) + b"{}", "states a header of"),
        (lying(b"not json"), "not JSON"),
        (lying(b"[" * 50_000), "not JSON"),
        (lying([]), "expected an object"),
        (lying({"a": TENSOR}, b"1234"), "describes 8"),
        (lying({"a": TENSOR}, b"1" * 12), "holds 12 bytes"),
        (lying({"a": TENSOR | {"shape": [2**40]}}, b"1" * 8), "its offsets give 8"),
        (lying({"a": TENSOR | {"shape": [-2, -1]}}, b"1" * 8), "malformed"),
        (lying({"a": TENSOR | {"dtype": "OBJECT"}}, b"1" * 8), "malformed"),
        (lying({"a": TENSOR | {"data_offsets": [8, 0]}}, b"1" * 8), "offsets give -8"),
        (lying({"a": TENSOR, "b": TENSOR}, b"1" * 8), "overlaps"),
        (lying({"a": TENSOR | {"data_offsets": [4, 12]}}, b"1" * 12), "gap"),
        (lying({"a": {"dtype": "F32"}}), "malformed"),
        (lying({"a": 7}), "malformed"),
        (lying({"a": TENSOR | {"shape": [2.0]}}, b"1" * 8), "malformed"),
        (lying({"a": TENSOR | {"dtype": ["F32"]}}, b"1" * 8), "malformed"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptVersionError, match=message):
        read_header(path)


@given(st.binary(max_size=200))
def test_random_bytes_never_pass_or_crash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CorruptVersionError:
        return
    assert tensors == {}  # an empty header is sound


@pytest.mark.parametrize("name", ["math", "a", "Qwen2.5-math_v1", "x" * 64])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../a",
        "a\\b",
        ".hidden",
        "-x",
        "x-",
        "a b",
        "a\x00",
        "a\n",
        "é",
        "a..b",
        "x" * 65,
        "%2e%2e",
    ],
)
def test_odd_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match="must be 1 to 64 characters"):
        check_name(name)


def test_hub_ids() -> None:
    assert check_hub_id("owner/name-1.0") == "owner/name-1.0"
    for odd in ("name", "a/b/c", "../x", "a/..", "a/b c", "/a"):
        with pytest.raises(InvalidInputError, match="owner/name"):
            check_hub_id(odd)


def test_paths_stay_below_the_roots(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "model").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("x")
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "good-link").symlink_to(inside / "model")
    roots = AllowedRoots([inside])
    assert roots.resolve("model", param="p") == inside / "model"
    assert roots.resolve(str(inside / "model"), param="p") == inside / "model"
    assert roots.resolve("good-link", param="p") == inside / "model"
    messages = set()
    for odd in (
        "../outside",
        "link",
        "link/secret",
        str(outside),
        "/etc/passwd",
        "loop",
        "absent",
        str(outside / "no"),
    ):
        with pytest.raises(InvalidInputError) as caught:
            roots.resolve(odd, param="target.path")
        messages.add(str(caught.value).replace(repr(odd), "X"))
    assert len(messages) == 1, "what lies outside must not be told from what does not exist"
    for odd in ("", "a\x00b", "x" * 5000):
        with pytest.raises(InvalidInputError):
            roots.resolve(odd, param="target.path")
    with pytest.raises(InvalidInputError, match="none is configured"):
        AllowedRoots([]).resolve("x", param="p")


def test_atomic_writes_leave_the_old_content_when_they_fail(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomically(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_free_space_and_locks(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1, purpose="a byte")
    with pytest.raises(StorageFullError, match="MiB left"):
        require_free_space(tmp_path, 10**18, purpose="an exabyte")
    with (
        locked_or_raise(tmp_path / "lock", timeout=0.0, purpose="it"),
        pytest.raises(TimeoutError, match="in use"),
        locked_or_raise(tmp_path / "lock", timeout=0.1, purpose="it"),
    ):
        pass
