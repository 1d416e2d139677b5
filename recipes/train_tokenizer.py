"""Train the tokenizer of the family: byte-level BPE with a chat template.

python -m recipes.train_tokenizer --data DATA --output OUT
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from recipes.standard_library import standard_library_rows
from recipes.text import DOMAINS, END_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, Row, train_rows

VOCABULARY_SIZE = 8192
MAX_LENGTH = 2048

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def build_tokenizer(texts: Iterator[str], vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `vocabulary_size` entries, special tokens and all 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Special tokens cut the text into segments. The line end after a marker always stays a token of its own:
            # otherwise it would merge with the indentation of an answer that is code, and the prompt that a server
            # encodes would not be a prefix of what was trained on.
            pre_tokenizers.Split(Regex(r"\A\n"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _texts(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        yield row.prompt
        yield row.response


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory with <domain>/train.jsonl.gz")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory to write the tokenizer files to"
    )
    parser.add_argument(
        "--vocabulary-size", type=int, default=VOCABULARY_SIZE, help="entries, special ones included"
    )
    arguments = parser.parse_args()

    rows = [row for domain in DOMAINS for row in train_rows(arguments.data, domain)]
    rows += standard_library_rows(held_out=False)
    tokenizer = build_tokenizer(_texts(rows), arguments.vocabulary_size)
    tokenizer.save_pretrained(arguments.output)
    print(f"tokenizer: {len(tokenizer)} entries from {len(rows)} rows, in {arguments.output}")


if __name__ == "__main__":
    main()
