"""Training prompts of every domain as JSON lines, in the form that `eda train-draft` and `eda adapt` read.

    python -m recipes.prompts --data DATA --output PROMPTS

Each line is `{"id", "prompt", "response"}`. Drafts never learn from the responses (the models answer the prompts
themselves); they count for the draft vocabulary, and are the control of the benchmark.
"""

import argparse
import json
from pathlib import Path

from recipes.standard_library import standard_library_rows
from recipes.text import DOMAINS, Row, shuffled, train_rows


def prompt_rows(data: Path, domain: str, seed: int = 0) -> list[Row]:
    """Training rows of a domain, each once, shuffled."""
    rows = train_rows(data, domain)
    if domain == "code":
        rows += standard_library_rows(held_out=False)
    return shuffled(rows, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with <domain>/train.jsonl.gz")
    parser.add_argument("--output", type=Path, required=True, help="directory of the files <domain>.jsonl")
    arguments = parser.parse_args()

    arguments.output.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        lines = (
            json.dumps(
                {"id": f"{domain}-{index}", "prompt": row.prompt, "response": row.response},
                ensure_ascii=False,
            )
            for index, row in enumerate(prompt_rows(arguments.data, domain))
        )
        text = "".join(f"{line}\n" for line in lines)
        (arguments.output / f"{domain}.jsonl").write_text(text, encoding="utf-8")
        print(f"prompts: {domain}, {text.count(chr(10))}")


if __name__ == "__main__":
    main()
