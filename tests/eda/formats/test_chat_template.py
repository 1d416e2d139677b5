"""Chat templates: the same text as transformers, and nobody's words lost, whatever form of content a template wants."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from eda.errors import CheckpointError
from eda.formats.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    CompiledTemplate,
    render,
    template_source,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why  <is>\n'it' & so?"},
    {"role": "assistant", "content": "Because. 漢字"},
    {"role": "user", "content": " And now? "},
]
TEXT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
PARTS = "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{{ p['text'] }}{% endfor %}\n{% endfor %}"
EITHER = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}\n{% endfor %}"
)
BY_ROLE = (  # the system's words as a text, the others' as parts
    "{% if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% set c = m['content'] %}{% for p in c if p.type == 'text' %}{{ p.text|trim }}\n{% endfor %}"
    "{% endfor %}"
)
MACRO = (  # no loop over content that a look at the source would find
    "{% macro show(content) %}{{ content|map(attribute='text')|join }}{% endmacro %}"
    "{% for m in messages %}<{{ m.role }}>{{ show(m['content']) }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content|trim }}|{% endfor %}"
)


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def reference(template: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.mark.parametrize(
    "template",
    [
        TEXT,
        EITHER,
        "{{ bos_token }}{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{- m.content }}{{ eos_token }}\n"
        "    {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}<go>{% endif %}",
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.content }}{% endfor %}"
        "{{ ns.n }}{{ dict(a=1).a }}",
        "{{ messages|tojson }}{{ messages[1]|tojson(indent=2) }}{{ tools is none }}{{ documents is defined }}",
        "{% for m in messages %}{{ m.content.strip().split('?')[0]|upper }}{{ unknown }}{% endfor %}",
        "{{ strftime_now('%Y') }}{% for m in messages %}{{ m['content'] }}{% endfor %}{{ pad_token is defined }}",
    ],
)
def test_the_text_is_that_of_transformers(template: str) -> None:
    theirs = reference(template).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    tokens = (("bos_token", "<s>"), ("eos_token", "</s>"))
    assert render(ChatTemplate(template, tokens), CHAT) == theirs


@pytest.mark.parametrize("template", [TEXT, PARTS, EITHER, BY_ROLE, MACRO])
@pytest.mark.parametrize("form", ["text", "parts"])
def test_every_word_reaches_the_prompt_in_both_forms(template: str, form: str) -> None:
    chat: list[dict[str, Any]] = [
        {"role": turn["role"], "content": turn["content"] if form == "text" else parts(turn["content"])}
        for turn in CHAT
    ]
    text = render(ChatTemplate(template), chat)
    for turn in CHAT:
        assert turn["content"].strip() in text
    changed = [*chat[:-1], {"role": "user", "content": parts("Other") if form == "parts" else "Other"}]
    assert render(ChatTemplate(template), changed) != text
    assert "'type'" not in text


def test_content_stays_as_it_came_where_the_template_takes_it() -> None:
    two = [{"role": "user", "content": parts("one", "two")}]
    assert render(ChatTemplate(EITHER), two) == "user: [one][two]"
    assert render(ChatTemplate(TEXT), two) == "user: onetwo\n"
    assert render(ChatTemplate(EITHER), [{"role": "user", "content": "one"}]) == "user: one"


def test_forms_of_templates_that_refuse_some_roles() -> None:
    template = CompiledTemplate(ChatTemplate(ALTERNATING))
    assert template.render([{"role": "user", "content": parts("one", "two")}]) == "onetwo|"
    with pytest.raises(ChatTemplateError, match="refuses these messages: roles must alternate"):
        template.render([{"role": "assistant", "content": "x"}])


def test_templates_that_leave_out_what_users_say_are_refused() -> None:
    with pytest.raises(ChatTemplateError, match="leaves out what users say"):
        render(ChatTemplate("{% for m in messages %}{{ m['text'] }}{% endfor %}<go>"), CHAT)


def test_a_limit_on_the_text() -> None:
    template = CompiledTemplate(ChatTemplate(TEXT))
    assert template.render(CHAT[:1], max_chars=100) == "system: Be brief.\n"
    with pytest.raises(ChatTemplateError, match="more than 10 characters"):
        template.render(CHAT[:1], max_chars=10)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    assert template_source(tmp_path, {}) is None
    assert template_source(tmp_path, {"chat_template": "one"}) == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    assert template_source(tmp_path, {"chat_template": named}) == "three"
    with pytest.raises(CheckpointError, match="chat_template that is a JSON int"):
        template_source(tmp_path, {"chat_template": json.loads("7")})
    (tmp_path / "chat_template.jinja").write_text("four", encoding="utf-8")
    assert template_source(tmp_path, {"chat_template": "one"}) == "four"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="cannot be read"):
        template_source(tmp_path, {})
