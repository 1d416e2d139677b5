"""The console script: the server as a process, generation, and measurements."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from eda.server.bundled_prompts import bundled_prompts
from eda.server.calibration import Measurement, best_levels, draft_costs
from eda.server.cli import app
from eda.server.engine.speculation import SpeculationLevel, SpeculationTable
from eda.server.load_generator import ClientView, LoadResult, read_prompts
from eda.server.load_report import with_ratios
from eda.speculation.costs import DraftCosts
from tests.support.oracle import Oracle

ROOT = Path(__file__).parents[2]
PROMPT = "the quick brown fox"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def models(family_directory: Path) -> list[str]:
    return ["--models-dir", str(family_directory), "--weights", "float32"]


@pytest.mark.parametrize("draft", ["none", "shared", "lookup"])
@pytest.mark.parametrize("model", ["base", "math", "full"])
def test_generate_prints_the_targets_text(models: list[str], oracle: Oracle, model: str, draft: str) -> None:
    arguments = [
        "generate",
        "--model",
        model,
        "--prompt",
        PROMPT,
        "--max-tokens",
        "20",
        "--draft",
        draft,
        *models,
    ]
    code, text, report = run(*arguments)
    assert code == 0
    assert text.removesuffix("\n") == oracle.text(model, PROMPT, 20)
    assert "tokens/s" in report
    assert f"(draft: {draft}; weights: float32; passes: torch)" in report


def test_generate_takes_directories(models: list[str], family_directory: Path, oracle: Oracle) -> None:
    for name in ("base", "math", "full"):
        path = str(family_directory / name)
        code, text, _ = run("generate", "--model", path, "--prompt", PROMPT, "--max-tokens", "8", *models)
        assert (code, text.removesuffix("\n")) == (0, oracle.text(name, PROMPT, 8))


def test_generate_stands_alone_without_a_family(
    family_directory: Path, tmp_path: Path, oracle: Oracle
) -> None:
    alone = ["--models-dir", str(tmp_path), "--weights", "float32"]
    path = str(family_directory / "full")
    code, text, report = run("generate", "--model", path, "--prompt", PROMPT, "--max-tokens", "8", *alone)
    assert (code, text.removesuffix("\n")) == (0, oracle.text("full", PROMPT, 8))
    assert "(draft: lookup; weights: float32; passes: torch)" in report


def test_generate_as_json(models: list[str]) -> None:
    code, text, _ = run(
        "generate", "--model", "math", "--prompt", PROMPT, "--max-tokens", "8", "--json", *models
    )
    assert code == 0
    answer = json.loads(text)
    assert len(answer["token_ids"]) == 8
    assert (answer["weights"], answer["instructions"]) == (["float32"], None)
    assert answer["mean_acceptance_length"] >= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nobody", "--prompt", "x"], "must be a directory or one of: base"),
        (["--model", "math", "--prompt", "x", "--draft", "private"], "no private module"),
        (["--model", "math", "--prompt", ""], "the prompt has 0 tokens"),
        (["--model", "math", "--prompt", "x" * 600], "the prompt has"),
        (["--model", "math", "--prompt", "x", "--top-p", "2"], "top_p"),
    ],
)
def test_generate_refuses_with_a_sentence(models: list[str], arguments: list[str], message: str) -> None:
    code, _, error = run("generate", *arguments, *models)
    assert code == 2
    assert message in error


def test_bench_serve_measures_all_modes(url: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"id": "{n}", "prompt": "fox {n}"}}\n' for n in range(3)), encoding="utf-8")
    output = tmp_path / "numbers.json"
    code, table, error = run(
        *("bench", "serve", "--url", url, "--model", "math", "--prompts", str(prompts), "--max-tokens", "6"),
        *(
            "--concurrency",
            "1,2",
            "--draft",
            "none,shared,private,lookup",
            "--json",
            str(output),
            "--ignore-eos",
        ),
    )
    assert code == 0, error
    assert "vs none" in table
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert [(r["concurrency"], r["draft"]) for r in results] == [
        (concurrency, draft) for concurrency in (1, 2) for draft in ("none", "shared", "private", "lookup")
    ]
    for result in results:
        assert result["num_requests"] == 6
        assert result["num_tokens"] == 36
        assert result["tokens_per_second"] > 0
        assert set(result["inter_token_latency_ms"]) == {"p50", "p90", "p99"}
    assert results[0]["speedup_over_none"] == 1.0
    assert results[0]["mean_acceptance_length"] == 1.0


@pytest.mark.parametrize(
    "arguments",
    [["--draft", "best"], ["--concurrency", "0"], ["--prompts", "nowhere"], ["--url", "http://127.0.0.1:9"]],
)
def test_bench_serve_refuses_with_a_sentence(arguments: list[str]) -> None:
    code, _, error = run("bench", "serve", "--model", "math", *arguments)
    assert code == 1
    assert error.startswith("eda bench serve: ")


def test_ratios_compare_within_one_concurrency() -> None:
    view = ClientView(num_tokens=100, num_target_passes=50, num_emitted=100.0)
    results = [
        LoadResult(concurrency, draft, seconds, [view])
        for concurrency, draft, seconds in [
            (1, "none", 4.0),
            (1, "private", 2.0),
            (8, "none", 1.0),
            (8, "private", 2.0),
        ]
    ]
    assert [row["speedup_over_none"] for row in with_ratios(results, "none")] == [1.0, 2.0, 1.0, 0.5]
    assert results[0].acceptance_length == 2.0


def test_bundled_prompts_can_be_read() -> None:
    for domain in ("math", "code", "medical", "general"):
        path = bundled_prompts(domain)
        prompts = read_prompts(path, 1000)
        assert len(set(prompts)) == len(prompts) >= 32


def test_calibration_takes_the_fastest_and_plain_decoding_when_nothing_is_clearly_faster() -> None:
    measurements = [
        Measurement(1, "chain", 0, 100.0, 1.0),
        Measurement(1, "chain", 2, 200.0, 2.4),
        Measurement(1, "tree", 3, 220.0, 2.9),
        Measurement(8, "chain", 0, 400.0, 1.0),
        Measurement(8, "chain", 2, 410.0, 2.4),
    ]
    assert best_levels(measurements) == (SpeculationLevel(1, "tree", 3), SpeculationLevel(8, "chain", 0))
    # A step with two draft passes emits 2.4 tokens in 12 ms; a plain one takes 10 ms.
    assert draft_costs(measurements, verified=0.04) == DraftCosts(0.06, 0.04, 0.06)


def test_calibration_tells_what_drafting_at_all_takes_from_what_each_token_takes() -> None:
    """Steps of 10 ms, and with ``k`` draft tokens of 12 + 2 k ms."""
    measurements = [Measurement(1, "chain", 0, 100.0, 1.0)]
    measurements += [
        Measurement(1, "chain", k, 1e3 * (1 + k / 2) / (12 + 2 * k), 1 + k / 2) for k in (1, 2, 4)
    ]
    measurements.append(Measurement(1, "chain", 4, 1.0, 1.0, min_probability=0.1))
    measurements.append(Measurement(1, "chain", 4, 1.0, 1.0, temperature=1.0))
    assert draft_costs(measurements, verified=0.15) == DraftCosts(0.05, 0.15, 0.25)


def test_calibration_chooses_for_sampled_sequences_apart() -> None:
    measurements = [
        Measurement(1, "chain", 0, 100.0, 1.0),
        Measurement(1, "chain", 5, 200.0, 3.0),
        Measurement(1, "chain", 0, 90.0, 1.0, temperature=1.0),
        Measurement(1, "chain", 2, 99.0, 1.8, 0.1, temperature=1.0),
        Measurement(1, "chain", 5, 80.0, 2.0, temperature=1.0),
    ]
    [level] = best_levels(measurements)
    assert level == SpeculationLevel(1, "chain", 5, sampled_chain=2, sampled_min_probability=0.1)


@pytest.mark.slow
def test_calibrate_writes_a_table_that_the_server_takes(models: list[str], tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    prompts = bundled_prompts("math")
    code, text, error = run(
        *(
            "bench",
            "calibrate",
            "--output",
            str(output),
            "--model",
            "math",
            "--batch-sizes",
            "1,4",
            "--repeats",
            "1",
        ),
        *("--max-tokens", "8", "--max-length", "2", "--prompts", str(prompts), *models),
    )
    assert code == 0, error
    assert "plain" in text
    table = SpeculationTable.load(output)
    assert [level.max_batch_size for level in table.levels] == [1, 4]
    measured = json.loads(output.read_text(encoding="utf-8"))["measurements"]
    assert {(m["batch_size"], m["temperature"], m["num_speculative_tokens"]) for m in measured} == {
        (batch_size, temperature, length)
        for batch_size in (1, 4)
        for temperature in (0.0, 1.0)
        for length in (0, 1, 2)
    }
    assert table.costs.verification_cost < 1.0


class Process:
    """`eda serve` in a process of its own."""

    def __init__(self, family: Path, data: Path, *arguments: str, before: str = "") -> None:
        """``before``: Python that runs first."""
        command = [
            sys.executable,
            "-c",
            f"from eda.server.cli import main\n{before}\nmain()",
            "serve",
            "--port",
            "0",
        ]
        command += ["--models-dir", str(family), "--data-dir", str(data), "--log-format", "json", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "EDA_WORKER": "false"}
        self.log = data.parent / "log"
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)

    def events(self) -> list[dict[str, object]]:
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def url(self) -> str:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
            for event in self.events():
                if event["event"] == "listening":
                    url = f"http://127.0.0.1:{event['port']}"
                    if "ready" in [other["event"] for other in self.events()]:
                        return url
            time.sleep(0.1)
        raise AssertionError("the server did not start: " + self.log.read_text(encoding="utf-8"))


USER_KEY, ADMIN_KEY = "the-key-of-a-user", "the-key-of-the-boss"


@pytest.fixture
def process(family_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """With keys, which nothing may write down."""
    monkeypatch.setenv("EDA_API_KEYS", USER_KEY)
    monkeypatch.setenv("EDA_ADMIN_KEY", ADMIN_KEY)
    monkeypatch.setenv("EDA_LOG_LEVEL", "debug")
    process = Process(family_directory, tmp_path / "data")
    yield process
    if process.process.poll() is None:
        process.process.kill()
    process.process.wait(20)


@pytest.mark.slow
def test_a_signal_drains_the_server(process: Process) -> None:
    body = {"model": "math", "prompt": "secret words", "max_tokens": 300, "stream": True, "ignore_eos": True}
    url = process.url()
    for key in (USER_KEY, ADMIN_KEY, "the-key-of-nobody"):
        httpx.get(f"{url}/adapters", headers={"Authorization": f"Bearer {key}"})
    headers = {"Authorization": f"Bearer {USER_KEY}"}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in rest[-2]
    assert process.process.wait(30) == 0
    [line] = [
        event for event in process.events() if event["event"] == "request" and event["method"] == "POST"
    ]
    assert (line["model"], line["completion_tokens"], line["finish_reason"]) == ("math", 300, "length")
    log = process.log.read_text(encoding="utf-8")
    assert "secret" not in log
    assert "the-key-of" not in log
    assert all(
        {"id", "status", "latency_ms"} <= set(event)
        for event in process.events()
        if event["event"] == "request"
    )


@pytest.mark.slow
def test_models_that_cannot_be_loaded_end_the_process(family_directory: Path, tmp_path: Path) -> None:
    process = Process(family_directory, tmp_path / "data", "--target", str(family_directory / "math"))
    try:
        assert process.process.wait(90) == 2
    finally:
        process.process.kill()
        process.process.wait(20)
    assert "target: " in process.log.read_text(encoding="utf-8")
    assert "is a PEFT adapter" in process.log.read_text(encoding="utf-8")


BREAK_THE_ENGINE = """
from eda.decoder import SpeculativeDecoder
class Gone(BaseException): pass
def step(self, rows): raise Gone("the device is gone")
SpeculativeDecoder.step = step
"""


STALL_THE_ENGINE = """
import time
from eda.decoder import SpeculativeDecoder
SpeculativeDecoder.step = lambda self, rows: time.sleep(3600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", [BREAK_THE_ENGINE, STALL_THE_ENGINE], ids=["dies", "stalls"])
def test_an_engine_that_dies_or_stalls_ends_the_process(
    family_directory: Path, tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDA_STALL_SECONDS", "2")
    process = Process(family_directory, tmp_path / "data", before=before)
    try:
        body = {"model": "math", "prompt": "x"}
        response = httpx.post(f"{process.url()}/v1/completions", json=body, timeout=60)
        assert response.status_code == 503
        assert process.process.wait(30) == 1
    finally:
        process.process.kill()
        process.process.wait(20)
    assert process.events()[-1]["event"] == "stopped"
