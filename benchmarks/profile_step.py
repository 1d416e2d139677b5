"""Where the time of one speculative step goes, for a lone sequence on the CPU, and what the machine could do at best.

    python -m benchmarks.profile_step --models models --model math
    python -m benchmarks.profile_step --models models --model math --temperature 1
    EDA_CPU_KERNELS=0 python -m benchmarks.profile_step --models models --model math      # the same on torch alone

Each part is a median over steps. The floor counts what a pass has to read (weights, keys and values) at the read
bandwidth that is measured in the same run, and what it has to compute at the measured rate of matrix products.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoTokenizer

from benchmarks.compare import load_family
from eda.decoder import ScheduledRow, SpeculativeDecoder
from eda.formats.weight_settings import WeightSetting
from eda.sampling.params import SamplingParams
from eda.server.model_paths import model_paths
from eda.server.settings import load_settings
from eda.speculation.kinds import Chain, Off
from eda.speculation.sequence import SequenceState

PROMPT = "Explain step by step what happens when water boils, and why."


class Stopwatch:
    """Adds up the seconds spent in wrapped functions, per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replaces a method of ``owner`` by one that is timed."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*arguments, **named)
            finally:
                self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start

        setattr(owner, name, timed)

    @contextmanager
    def step(self, found: dict[str, list[float]]) -> Iterator[None]:
        """Takes one step's figures."""
        self.seconds = {}
        start = time.perf_counter()
        yield
        found.setdefault("whole step", []).append(time.perf_counter() - start)
        for label, seconds in self.seconds.items():
            found.setdefault(label, []).append(seconds)


def read_bandwidth() -> float:
    """Bytes a second that the CPU reads from an array of the size of a small model, all threads together."""
    size = 32 * 2**20
    array = torch.ones(size // 4)
    seconds = [_timed(lambda: array.sum()) for _ in range(30)]
    return size / min(seconds)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product."""
    size = 1024
    left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    seconds = [_timed(lambda: left @ right) for _ in range(20)]
    return 2 * size**3 / min(seconds)


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def profile(
    decoder: SpeculativeDecoder, state: SequenceState, watch: Stopwatch, num_steps: int
) -> tuple[dict[str, float], float]:
    """Medians in seconds by part, and the acceptance length, over ``num_steps`` steps behind the prompt."""
    decoder.admit(state)
    try:
        while state.is_prefilling:
            decoder.step([ScheduledRow(state, state.num_uncomputed)])
        row = [ScheduledRow(state)]
        for _ in range(5):
            decoder.step(row)
        found: dict[str, list[float]] = {}
        emitted = 0
        for _ in range(num_steps):
            with watch.step(found):
                emitted += len(decoder.step(row)[0].token_ids)
    finally:
        decoder.release(state)
    return {label: statistics.median(values) for label, values in found.items()}, emitted / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, help="family directory [the bundled one]")
    parser.add_argument("--model", default="math", help="fine-tune")
    parser.add_argument("--length", type=int, default=5, help="draft tokens in a chain")
    parser.add_argument("--steps", type=int, default=150, help="steps that are measured")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy [0]")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampled tokens [1: off]")
    parser.add_argument("--weights", choices=get_args(WeightSetting), default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bandwidth = read_bandwidth()
    paths = model_paths(load_settings(None, {"models_dir": arguments.models}))
    family = load_family(paths, [arguments.model], arguments.weights)
    target, draft, fine_tune = family.target, family.draft, family.fine_tunes[arguments.model]
    private = family.privates.get(arguments.model)
    if draft is None:
        raise SystemExit("benchmarks.profile_step: the family has no shared draft to profile")
    rate = product_rate(target.dtype)
    tokenizer = AutoTokenizer.from_pretrained(paths.target)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    backend = SpeculativeDecoder.for_models(target, draft, num_slots=1).backend.name
    print(
        f"{arguments.model}, {target.dtype}, {backend}, {torch.get_num_threads()} threads, "
        f"temperature {arguments.temperature:g}, top_p {arguments.top_p:g}, torch {torch.__version__}"
    )

    config = fine_tune.model.config
    per_layer = config.hidden_size * (
        2 * config.query_size + 2 * config.kv_size + 3 * config.intermediate_size
    )
    weights = per_layer * config.num_layers + config.vocab_size * config.hidden_size
    for name, speculation in (
        ("plain", Off()),
        (f"chain of {arguments.length}", Chain(arguments.length)),
    ):
        decoder = SpeculativeDecoder.for_models(target, draft, num_slots=2048, seed=0)
        watch = Stopwatch()
        watch.wrap(decoder, "_propose", "draft (extension and chain)")
        watch.wrap(decoder, "_run_target", "target (pass and head)")
        watch.wrap(decoder, "_verify", "verification")
        watch.wrap(decoder, "_accept", "bookkeeping")
        state = SequenceState(
            list(prompt),
            len(prompt) + 1024,
            fine_tune,
            SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p),
            private=private,
            speculation=speculation,
        )
        medians, emitted = profile(decoder, state, watch, arguments.steps)
        tokens = speculation.num_nodes + 1
        size = target.dtype.itemsize
        floor = max(weights * size / bandwidth, 2 * weights * tokens / rate)
        print(f"\n{name}: {emitted:.2f} tokens a step")
        for label, seconds in sorted(medians.items(), key=lambda item: -item[1]):
            share = seconds / medians["whole step"]
            print(f"  {label:32}{seconds * 1e3:8.3f} ms {share:6.0%}")
        print(
            f"  {'target pass, floor':32}{floor * 1e3:8.3f} ms ({weights * size / 2**20:.0f} MiB, {tokens} tokens)"
        )
    print(f"\nreads {bandwidth / 1e9:.0f} GB/s, products {rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
