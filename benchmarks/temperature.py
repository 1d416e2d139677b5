"""Drafting at a temperature: plain decoding, the shared draft and private modules on held-out prompts, to their ends.

    python -m benchmarks.temperature --data DATA --threads 1
    python -m benchmarks.temperature --data DATA --threads 1 --temperatures 0.7 --top-p 0.9

One sequence at a time, as the server decodes it: what is drafted is chosen step by step by its policy. The three ways
take turns prompt by prompt. Seconds are also counted as the process's CPU time: with one thread that is what a step
takes on a machine that other work shares, where the clock on the wall says little.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.compare import DOMAINS, load_family
from benchmarks.own_engine import KINDS, Family
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.sampling.params import SamplingParams
from eda.server.engine.draft_mode import DraftMode
from eda.server.engine.sequence import SequenceLabels, StepStats
from eda.server.engine.speculation import SpeculationPolicy, SpeculationTable
from eda.server.model_paths import model_paths
from eda.server.settings import load_settings
from eda.speculation.kinds import Off
from eda.speculation.sequence import SequenceState
from eda.training.data.prompts import ChatFormat
from recipes.acceptance import held_out_prompts

LONGEST_PROMPT = 512


@dataclass(slots=True)
class Totals:
    """What one way of decoding has done."""

    num_tokens: int = 0
    num_steps: int = 0
    num_emitted: int = 0
    num_drafted: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


class Contender:
    """One way of decoding, with a policy of its own that keeps what it learns from prompt to prompt."""

    def __init__(
        self,
        decoder: SpeculativeDecoder,
        family: Family,
        domain: str,
        kind: DraftMode,
        table: SpeculationTable,
    ) -> None:
        self._decoder = decoder
        self._fine_tune = family.fine_tunes[domain]
        self._private = family.privates[domain] if kind == "private" else None
        self._labels = SequenceLabels(domain, kind)
        self._policy = SpeculationPolicy(table)
        self._start = Off() if kind == "none" else self._policy.largest

    def run(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        max_tokens: int,
        ends: frozenset[int],
        totals: Totals,
    ) -> None:
        """Completes one prompt up to its end token."""
        wall, cpu = time.perf_counter(), time.process_time()
        state = SequenceState(
            list(prompt), len(prompt) + max_tokens, self._fine_tune, sampling, self._private, self._start
        )
        self._decoder.admit(state)
        try:
            while not self._is_done(state, ends):
                self._step(state, totals)
        finally:
            self._decoder.release(state)
        totals.wall_seconds += time.perf_counter() - wall
        totals.cpu_seconds += time.process_time() - cpu
        answer = state.token_ids[state.num_prompt_tokens :]
        end = next((place for place, token in enumerate(answer, 1) if token in ends), len(answer))
        totals.num_tokens += min(end, max_tokens)

    def _step(self, state: SequenceState, totals: Totals) -> None:
        decodes, sampled = not state.is_prefilling, not state.sampling.is_greedy
        if decodes:
            self._policy.observe_batch(1)
            state.speculation = self._policy.choose(self._labels, state.speculation, sampled=sampled)
        [result] = self._decoder.step([ScheduledRow(state, state.num_uncomputed)])
        if decodes:
            totals.num_steps += 1
            totals.num_emitted += len(result.token_ids)
            totals.num_drafted += result.num_draft_tokens
            self._policy.observe_step(
                StepStats(
                    self._labels,
                    state.speculation.mode,
                    result.num_draft_tokens,
                    result.num_accepted,
                    len(result.token_ids),
                    sampled,
                )
            )

    @staticmethod
    def _is_done(state: SequenceState, ends: frozenset[int]) -> bool:
        if len(state.token_ids) >= state.max_length:
            return True
        # A step emits few tokens: the end is among the last ones, or was seen before.
        return any(token in ends for token in state.token_ids[state.num_prompt_tokens :][-64:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="directory with <domain>/eval.jsonl")
    add("--models", type=Path, help="family directory [the bundled one]")
    add("--domains", default=",".join(DOMAINS))
    add("--temperatures", default="1,0.7", help="separated by commas; 0 is greedy [1,0.7]")
    add("--top-p", type=float, default=1.0, help="nucleus [1: off]")
    add("--num-prompts", type=int, default=20, help="held-out prompts of each domain [20]")
    add("--tokens", type=int, default=128, help="longest answer [128]")
    add("--threads", type=int, default=0, help="CPU threads [torch's choice]")
    add("--calibration", type=Path, help="what to draft, by `eda bench calibrate` [the built-in table]")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    domains = arguments.domains.split(",")
    paths = model_paths(load_settings(None, {"models_dir": arguments.models}))
    family = load_family(paths, domains, "auto")
    target = family.target
    decoder = SpeculativeDecoder.for_models(target, family.draft, num_slots=2048, seed=0)
    backend = decoder.backend.name
    table = (
        SpeculationTable.default(decoder.backend.costs)
        if arguments.calibration is None
        else SpeculationTable.load(arguments.calibration)
    )
    chat = ChatFormat.load(paths.target, eos_ids=target.config.eos_token_ids)
    print(f"{target.dtype}, {backend}, {torch.get_num_threads()} threads, {arguments.num_prompts} prompts")
    print(
        "| model | temperature | draft | drafted | tokens a step | tokens/s | / plain | / plain, CPU time |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|")
    for domain in domains:
        prompts = [
            ids
            for prompt in held_out_prompts(arguments.data, domain, arguments.num_prompts)
            if len(ids := chat.prompt_ids(prompt.messages)) <= LONGEST_PROMPT
        ]
        contenders = {kind: Contender(decoder, family, domain, kind, table) for kind in KINDS}  # type: ignore[arg-type]
        for temperature in map(float, arguments.temperatures.split(",")):
            sampling = SamplingParams(temperature=temperature, top_p=arguments.top_p)
            totals = {kind: Totals() for kind in KINDS}
            for contender in contenders.values():  # what runs first pays for warming up
                contender.run(prompts[0], sampling, 16, chat.eos_ids, Totals())
            for place, prompt in enumerate(prompts):
                for turn in range(len(KINDS)):
                    kind = KINDS[(place + turn) % len(KINDS)]
                    contenders[kind].run(prompt, sampling, arguments.tokens, chat.eos_ids, totals[kind])
            plain = totals["none"]
            for kind, found in totals.items():
                rate, cpu_rate = found.num_tokens / found.wall_seconds, found.num_tokens / found.cpu_seconds
                over = rate / (plain.num_tokens / plain.wall_seconds)
                over_cpu = cpu_rate / (plain.num_tokens / plain.cpu_seconds)
                print(
                    f"| {domain} | {temperature:g} | {kind} | {found.num_drafted / found.num_steps:.2f} "
                    f"| {found.num_emitted / found.num_steps:.2f} | {rate:.0f} | {over:.2f} | {over_cpu:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
