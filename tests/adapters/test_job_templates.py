"""Jobs answer prompts under the template that the fine-tune is served with, and outlive templates that never end."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from eda.adapters.errors import JobInterruptedError
from eda.errors import DataError
from eda.formats.tokenizer_files import load_tokenizer
from eda.training.data.samples import read_samples
from tests.adapters.test_training_stages import Job
from tests.support.family import save_family

OWN = "{% for m in messages %}<|user|>Q {{ m['content'] }}{% endfor %}<|assistant|>"
SLOW = OWN + "{% if 'fox' in messages[0]['content'] %}{% for a in range(LOOPS) %}{% endfor %}{% endif %}"


@pytest.fixture(scope="module")
def base_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


def job_with_template(family: Path, directory: Path, template: str) -> Job:
    shutil.copytree(family, directory / "family")
    (directory / "family" / "math" / "chat_template.jinja").write_text(template, encoding="utf-8")
    job = Job(directory / "family", directory)
    job.spec = replace(job.spec, triage=False)
    return job


def test_prompts_are_written_in_the_fine_tunes_own_template(base_family: Path, tmp_path: Path) -> None:
    job = job_with_template(base_family, tmp_path, OWN)
    assert job.run().version == 1
    tokenizer = load_tokenizer(base_family / "base")
    expected = {
        tuple(tokenizer.encode(f"<|user|>Q number {n} and the fox<|assistant|>", add_special_tokens=False))
        for n in range(8)
    }
    found = {sample.prompt_ids for sample in read_samples(job.workspace / "training.jsonl")}
    assert found
    assert found <= expected


def test_a_template_that_never_ends_fails_the_job_with_its_reason(base_family: Path, tmp_path: Path) -> None:
    job = job_with_template(
        base_family,
        tmp_path,
        SLOW.replace("LOOPS", "99999) %}{% for b in range(99999").replace(
            "{% endfor %}{% endif %}", "{% endfor %}{% endfor %}{% endif %}"
        ),
    )
    start = time.monotonic()
    with pytest.raises(DataError, match=r"prompt 'line-\d': the chat template takes more than 1 s"):
        job.run()
    assert time.monotonic() - start < 30.0


def test_a_job_is_cancelled_between_two_renderings(base_family: Path, tmp_path: Path) -> None:
    """Each takes a noticeable time and none is over the limit."""
    job = job_with_template(base_family, tmp_path, SLOW.replace("LOOPS", "99999"))
    (job.workspace / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"number {number} and the fox"}) + "\n" for number in range(5000))
    )

    def stop() -> bool:
        return ("stage_started", "regenerate") in {(event.kind, event.stage) for event in job.events}

    with pytest.raises(JobInterruptedError, match=r"stopped after \d+ of 2000 prompts were encoded"):
        job.run(stop)
    assert not (job.workspace / "regenerate" / "samples.jsonl").exists()
