"""Files of strangers, damaged at random: every reader takes them or refuses them in its own words, and soon."""

import gzip
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged, mutated, written

from eda.adapters.errors import CorruptVersionError
from eda.adapters.serving.model_loader import load_private_module
from eda.adapters.store.manifest import MANIFEST_FILE, Manifest
from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, DataError, EdaError
from eda.files import PRIVATE_WEIGHTS_FILE as PRIVATE_FILE
from eda.formats.checkpoint import vocabulary
from eda.formats.checkpoint_files import read_header
from eda.formats.preflight import check_draft, check_fine_tune, check_target
from eda.formats.tokenizer_files import load_tokenizer
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.probe import require_usable
from eda.models.target import TargetModel
from eda.server.engine.speculation import SpeculationTable, SpeculationTableError
from eda.speculation.costs import DraftCosts
from eda.training.data.prompts import ChatFormat, read_prompts, read_texts
from eda.training.data.samples import read_samples
from tests.support.reference_family import make_family
from tests.support.tiny import tiny_lora, tiny_target, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")
PROFILE = settings.get_profile("files")
SECONDS = 20.0
"""For one file; far above what any takes, far below what a size from the file could make it take."""


def taken_or_refused(read: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What ``read`` gives; ``None`` where it refuses. Anything else than ``errors`` fails the test."""
    start = time.monotonic()
    try:
        return read()
    except errors as error:
        told = str(error)
        told.encode()  # it has to be written into an answer
        return None
    finally:
        assert time.monotonic() - start < SECONDS


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("files")
    target = tiny_target(root / "target", tokenizer=True)
    sharded = tiny_target(root / "sharded", max_shard_size="40KB")
    lora = tiny_lora(root / "lora", target, targets=["q_proj", "down_proj", "lm_head"])
    draft = make_family(root / "family").paths["draft"]
    return {"target": target, "sharded": sharded, "lora": lora, "draft": draft}


@pytest.fixture(scope="module")
def base(directories: dict[str, Path]) -> TargetModel:
    return load_target(directories["target"], weights="float32")


def copied(source: Path) -> Path:
    """A copy that an example may damage."""
    copy = source.with_name(f"{source.name}-damaged")
    shutil.rmtree(copy, ignore_errors=True)
    return shutil.copytree(source, copy)


def damage(data: st.DataObject, file: Path) -> None:
    """Changes places of a JSON document, the header of safetensors, or bytes of any file."""
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.integers(0, 3)):
        file.write_bytes(written(data.draw(mutated(json.loads(content)))))
    elif file.suffix == ".safetensors" and data.draw(st.booleans()):
        length = int.from_bytes(content[:8], "little")
        header = written(data.draw(mutated(json.loads(content[8 : 8 + length]))))
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    else:
        file.write_bytes(data.draw(damaged(content)))


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("target", "config.json"),
        ("target", "generation_config.json"),
        ("target", "model.safetensors"),
        ("sharded", "model.safetensors.index.json"),
    ],
)
def test_targets(directories: dict[str, Path], name: str, file: str, data: st.DataObject) -> None:
    path = copied(directories[name])
    damage(data, path / file)
    taken_or_refused(lambda: check_target(path), CheckpointError)
    model = taken_or_refused(lambda: load_target(path, weights="float32"), CheckpointError)
    if model is not None:
        taken_or_refused(lambda: require_usable(FineTune("damaged", model)), CheckpointError)


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_loras(directories: dict[str, Path], base: TargetModel, file: str, data: st.DataObject) -> None:
    path = copied(directories["lora"])
    damage(data, path / file)
    taken_or_refused(lambda: check_fine_tune(path), CheckpointError)
    fine_tune = taken_or_refused(lambda: load_fine_tune(path, base, "damaged"), CheckpointError)
    if fine_tune is not None:
        taken_or_refused(lambda: require_usable(fine_tune), CheckpointError)


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_drafts(directories: dict[str, Path], file: str, data: st.DataObject) -> None:
    path = copied(directories["draft"])
    damage(data, path / file)
    taken_or_refused(lambda: check_draft(path), CheckpointError)
    taken_or_refused(lambda: DraftModel.load(path), CheckpointError)


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize("file", [MANIFEST_FILE, PRIVATE_FILE])
def test_private_modules(directories: dict[str, Path], file: str, data: st.DataObject) -> None:
    draft = DraftModel.load(directories["draft"])
    config = draft.config.private_config(8, 2, 2)
    path = directories["draft"].with_name("private")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    PrivateModule.initialised(config).save(path / PRIVATE_FILE)
    sizes = {name: getattr(config, name) for name in config.__slots__}
    prints = ("target_fingerprint", "fine_tune_fingerprint", "draft_fingerprint", "weights_sha256")
    manifest = Manifest("a", 1, "now", *"xyz", sizes, 9, "z")  # type: ignore[misc]
    (path / MANIFEST_FILE).write_text(json.dumps({**manifest.to_json(), **dict.fromkeys(prints, "x")}))
    damage(data, path / file)
    read = taken_or_refused(lambda: Manifest.read(path), CorruptVersionError)
    if read is not None:
        taken_or_refused(lambda: load_private_module(path, read, draft), CorruptVersionError)


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizers(directories: dict[str, Path], file: str, data: st.DataObject) -> None:
    path = directories["target"].with_name("tokenizer")
    shutil.rmtree(path, ignore_errors=True)
    tiny_tokenizer(path)
    damage(data, path / file)
    taken_or_refused(lambda: vocabulary(path), CheckpointError)
    taken_or_refused(lambda: load_tokenizer(path), EdaError)
    taken_or_refused(lambda: ChatFormat.load(path), EdaError)


PROMPTS = [
    {"id": 1, "prompt": "What?", "response": "That."},
    {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]},
]


@settings(PROFILE)
@given(data=st.data(), packed=st.booleans())
def test_prompts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, packed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / ("prompts.jsonl" + (".gz" if packed else ""))
    lines = b"\n".join(written(data.draw(mutated(row) | st.just(row))) for row in PROMPTS)
    content = data.draw(damaged(lines) | st.just(lines))
    packed_content = gzip.compress(content)
    path.write_bytes(data.draw(damaged(packed_content) | st.just(packed_content)) if packed else content)
    for prompt in taken_or_refused(lambda: read_prompts(path), DataError) or ():
        for message in prompt.messages:
            (message["role"] + message["content"]).encode()
    taken_or_refused(lambda: read_texts(path), DataError)


SAMPLE = {"id": "a", "prompt_ids": [1, 2], "response_ids": [3], "temperature": 0.5, "finish_reason": "stop"}


@settings(PROFILE)
@given(data=st.data())
def test_samples(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "samples.jsonl"
    content = written(data.draw(mutated(SAMPLE))) + b"\n"
    path.write_bytes(data.draw(damaged(content) | st.just(content)))
    taken_or_refused(lambda: read_samples(path), DataError)


@settings(PROFILE)
@given(data=st.data())
def test_calibrations(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "table.json"
    SpeculationTable.default(DraftCosts(verification_cost=0.07)).save(path)
    damage(data, path)
    taken_or_refused(lambda: SpeculationTable.load(path), SpeculationTableError)


@settings(PROFILE)
@given(content=st.binary(max_size=300))
def test_bytes_that_are_nothing(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "nothing.safetensors"
    path.write_bytes(content)
    taken_or_refused(lambda: read_header(path), CheckpointError)
