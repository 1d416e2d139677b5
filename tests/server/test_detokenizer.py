"""Text that comes piece by piece equals the text of all tokens at once, whatever the tokenizer."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eda.formats.tokenizer import TextTokenizer
from eda.server.engine.detokenizer import REPLACEMENT
from eda.server.tokenizer import detokenizer_of
from tests.support.family import tiny_tokenizer

FIRST_WORD = 257


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As in Llama 2: words begin with a mark for the space, and unknown characters are spelled in bytes."""
    words = ["▁the", "▁", "the", "a", "▁fox", "fox", ".", "▁é", "🙂"]
    vocabulary = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocabulary |= {word: FIRST_WORD + place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_LEVEL = TextTokenizer(tiny_tokenizer().backend_tokenizer)
METASPACE = TextTokenizer(metaspace_tokenizer().backend_tokenizer)
TOKENIZERS = {"byte-level": BYTE_LEVEL, "metaspace": METASPACE}


def pieces(tokenizer: TextTokenizer, ids: Sequence[int]) -> list[str]:
    detokenizer = detokenizer_of(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_pieces_equal_the_whole_text(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_real_text_never_shows_half_a_character(text: str) -> None:
    found = pieces(BYTE_LEVEL, BYTE_LEVEL.encode(text))
    assert "".join(found) == text
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in found)


def test_text_before_an_incomplete_character_is_not_held_back() -> None:
    ids = BYTE_LEVEL.encode("fox €")
    detokenizer = detokenizer_of(BYTE_LEVEL)
    before = "".join(detokenizer.push(token_id) for token_id in ids[:-1])
    assert before == "fox "
    assert detokenizer.push(ids[-1]) == "€"


def test_a_special_token_does_not_take_the_space_of_the_next_word() -> None:
    the, start, fox = FIRST_WORD, min(METASPACE.special_ids), FIRST_WORD + 4
    detokenizer = detokenizer_of(METASPACE)
    assert [detokenizer.push(token_id) for token_id in (the, start, fox)] == ["the", "", " fox"]
