"""A GGUF file as the target: the commands take it, and its own tokenizer and chat template are used."""

from pathlib import Path

import httpx
import pytest
import torch
from gguf_files import TYPES, write_gguf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from eda.backends.cpu.library import instruction_set, kernels
from eda.formats.tokenizer import TextTokenizer
from eda.formats.tokenizer_files import load_tokenizer
from eda.server.assembly import load_runtime
from eda.server.cli import app
from eda.server.model_paths import model_paths
from eda.server.services import Services
from eda.server.settings import ConfigurationError, Settings
from eda.training.data.prompts import ChatFormat
from tests.server.serving import serve
from tests.support.tiny import tiny_target

MESSAGES = [{"role": "user", "content": "the way"}]
RENDERED = "user: the way\nassistant: "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_target(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(checkpoint, tmp_path_factory.mktemp("gguf") / "model.gguf")


def expected_text(checkpoint: Path, tokenizer: TextTokenizer, prompt: str, max_tokens: int) -> str:
    """What transformers continues ``prompt`` with, from the checkpoint that the file was written from."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(
        ids, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids)
    )
    return tokenizer.decode(output[0, ids.shape[1] :].tolist())


def test_generate_takes_a_file(checkpoint: Path, file: Path) -> None:
    arguments = ["--prompt", "the way", "--chat", "--max-tokens", "12", "--weights", "float32"]
    result = CliRunner().invoke(app, ["generate", "--model", str(file), *arguments])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.removesuffix("\n") == expected_text(checkpoint, load_tokenizer(file), RENDERED, 12)


def test_generate_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", str(tmp_path / "no.gguf"), "--prompt", "x"])
    assert result.exit_code == 2
    assert "no.gguf cannot be read" in result.stderr


def test_the_server_takes_a_file(checkpoint: Path, file: Path, tmp_path: Path) -> None:
    settings = Settings(target=file, data_dir=tmp_path, weights="float32", device="cpu", log_level="error")
    services = Services(settings, load=load_runtime)
    with serve(services) as url, httpx.Client(base_url=url, timeout=60) as client:
        body = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
        answer = client.post("/v1/chat/completions", json=body).json()
    found = answer["choices"][0]["message"]["content"]
    assert found == expected_text(checkpoint, load_tokenizer(file), RENDERED, 12)


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"target: there is no file .*no\.gguf"):
        model_paths(Settings(target=tmp_path / "no.gguf"))


def test_training_encodes_with_the_files_own_tokenizer(file: Path) -> None:
    chat = ChatFormat.load(file)
    assert chat.prompt_ids(MESSAGES) == load_tokenizer(file).encode(RENDERED, add_special_tokens=False)
    assert chat.eos_ids == {257}


@pytest.mark.parametrize("weights", ["auto", "int8", "float32"])
def test_a_server_says_what_its_weights_run_as(tmp_path: Path, weights: str) -> None:
    if kernels() is None:
        pytest.skip("the C++ passes cannot run here")
    checkpoint = tiny_target(tmp_path / "hf", hidden_size=64, head_dim=32, intermediate_size=96)
    file = write_gguf(checkpoint, tmp_path / "model.gguf", TYPES.Q4_1)
    full = tiny_target(tmp_path / "full", seed=1, hidden_size=64, head_dim=32, intermediate_size=96)
    settings = Settings(
        target=file,
        fine_tunes={"full": full},
        data_dir=tmp_path,
        weights=weights,  # type: ignore[arg-type]
        device="cpu",
        log_level="error",
    )
    services = Services(settings, load=load_runtime)
    with serve(services) as url, httpx.Client(base_url=url, timeout=60) as client:
        version = client.get("/version").json()
        [base, tune] = client.get("/v1/models").json()["data"]
    own, others = {
        "auto": ("int4", "bfloat16"),
        "int8": ("int8", "int8"),
        "float32": ("float32", "float32"),
    }[weights]
    assert version["weights"] == base["weights"] == [own]
    assert tune["weights"] == [others]
    assert version["instructions"] == (None if weights == "float32" else instruction_set())


def test_weights_that_cannot_be_had_end_the_command(file: Path) -> None:
    result = CliRunner().invoke(app, ["generate", "--model", str(file), "--prompt", "x", "--weights", "int4"])
    assert result.exit_code == 2
    assert "weights is 'int4', which only the C++ passes compute with" in result.stderr
    assert "heads of 8" in result.stderr
