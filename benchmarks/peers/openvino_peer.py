"""OpenVINO GenAI, plain and with its prompt lookup, in 16, 8 and 4 bits.

Its models are exported by optimum-intel, which wants an older transformers than this project. Where it is not
installed beside the project, ``--openvino-exporter`` names the Python of an environment that has it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.interface import (
    Complete,
    Completion,
    MissingPeerError,
    Peer,
    PeerModel,
    one_by_one,
    require,
)
from benchmarks.peers.transformers_peer import LOOKUP_TOKENS

EXPORT_TIMEOUT = 1800
"""Seconds."""


def _export(model: PeerModel, weights: str | None) -> Path:
    destination = model.work / (f"openvino-{weights}" if weights else "openvino")
    if (destination / "openvino_model.xml").exists():
        return destination
    python = model.openvino_exporter or sys.executable
    if model.openvino_exporter is None and importlib.util.find_spec("optimum") is None:
        raise MissingPeerError(
            "no exported model: optimum-intel is not installed here; name a Python that has it with --openvino-exporter"
        )
    unfinished = destination.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [
        python,
        "-c",
        "from optimum.commands.optimum_cli import main; main()",
        *("export", "openvino", "--model", str(model.plain.resolve()), "--task", "text-generation-with-past"),
        # OpenVINO keeps matrices as float16 and computes in bfloat16 where the CPU has it; fp32 keeps all digits.
        *("--weight-format", weights or ("fp32" if model.dtype == torch.float32 else "fp16")),
        # Its usual groups of 128 do not divide the widths of small models.
        *(("--group-size", "64") if weights == "int4" else ()),
        str(unfinished.resolve()),
    ]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
    }  # everything is at hand, so nothing shall be waited for
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=EXPORT_TIMEOUT, check=False, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MissingPeerError(f"the export did not run: {error}") from error
    if not (unfinished / "openvino_model.xml").exists():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise MissingPeerError(f"the export failed: {last[:200]}")
    unfinished.rename(destination)
    return destination


def _build(model: PeerModel, weights: str | None = None, **options: Any) -> Complete:
    genai = require("openvino_genai", "openvino-genai")
    openvino = require("openvino", "openvino")
    pipeline = genai.LLMPipeline(
        str(_export(model, weights)),
        "CPU",
        INFERENCE_NUM_THREADS=model.threads,
        INFERENCE_PRECISION_HINT="f32" if model.dtype == torch.float32 else "bf16",
        **options,
    )

    def complete(prompt: list[int], max_tokens: int) -> Completion:
        config = genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
        if options.get("prompt_lookup"):
            config.num_assistant_tokens = LOOKUP_TOKENS
            config.max_ngram_size = 3
        ids = np.array([prompt], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        result = pipeline.generate(inputs, config)
        tokens = list(result.tokens[0])
        passes = len(result.perf_metrics.raw_metrics.token_infer_durations)
        # Prompt lookup of some releases reports no passes at all.
        return Completion(tokens, passes - 1, len(tokens) - 1) if passes > 1 else Completion(tokens)

    return one_by_one(complete)


def _plain(model: PeerModel) -> Complete:
    return _build(model)


def _prompt_lookup(model: PeerModel) -> Complete:
    return _build(model, prompt_lookup=True)


def _int8(model: PeerModel) -> Complete:
    return _build(model, "int8")


def _int4(model: PeerModel) -> Complete:
    return _build(model, "int4")


def _int8_lookup(model: PeerModel) -> Complete:
    return _build(model, "int8", prompt_lookup=True)


PEERS = (Peer("OpenVINO GenAI", _plain), Peer("OpenVINO GenAI prompt lookup", _prompt_lookup))
QUANTISED_PEERS = (
    Peer("OpenVINO GenAI int8", _int8),
    Peer("OpenVINO GenAI int4", _int4),
    Peer("OpenVINO GenAI int8 prompt lookup", _int8_lookup),
)
"""As optimum-intel quantises by default, but for the size of a group in 4 bits."""
