"""What the server does with a model's tokenizer beyond encoding and decoding."""

import asyncio
from collections.abc import Sequence

from eda.adapters.templates.renderer import TemplateRenderer
from eda.formats.chat_template import Message
from eda.formats.tokenizer import TextTokenizer
from eda.server.engine.detokenizer import IncrementalDetokenizer


def detokenizer_of(tokenizer: TextTokenizer) -> IncrementalDetokenizer:
    """A fresh detokenizer for one output."""
    return IncrementalDetokenizer(tokenizer.decode, tokenizer.special_texts, tokenizer.joined_ids)


async def render_chat(
    templates: TemplateRenderer, tokenizer: TextTokenizer, messages: Sequence[Message]
) -> str:
    """The text of a prompt, rendered with limits and off the event loop. Raises ``ChatTemplateError``."""
    return await asyncio.wrap_future(templates.submit(tokenizer.require_chat_template(), messages))
