"""A GGUF file as the target: the commands take it, and its own tokenizer and chat template are used."""

from pathlib import Path

import httpx
import pytest
import torch
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

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
