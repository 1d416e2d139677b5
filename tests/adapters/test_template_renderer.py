"""Chat templates of strangers: whatever they do ends soon, costs little memory and harms nobody else."""

import time
from collections.abc import Iterator

import psutil
import pytest

from eda.adapters.templates.renderer import MAX_PROCESSES, TemplateRenderer
from eda.formats.chat_template import MAX_SOURCE_CHARS, ChatTemplate, ChatTemplateError

GOOD = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
HELLO = [{"role": "user", "content": "hello"}]
GROWING = (
    "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
)
WORST = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "a loop over messages": GOOD
    + "{% if messages|length > 3 %}"
    + "{% for a in range(99999) %}" * 4
    # beyond what the trial sees: only a longer chat meets it
    + "{% endfor %}" * 4
    + "{% endif %}",
    "branching macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubled text": GROWING.format(start="'ab'", step="ns.x ~ ns.x") + "{{ ns.x }}",
    "multiplied text": "{{ 'a' * 10 ** 10 }}",
    "multiplied content": "{{ messages[0]['content'] * 10 ** 10 }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a power of content": "{% set n = messages|length + 8 %}{{ (n ** n ** n) % 7 }}",
    "width of %": "{{ '%9999999999d' % messages|length }}",
    "width of format": "{{ '{:>9999999999}'.format(messages|length) }}",
    "centred": "{{ messages[0]['content']|center(10 ** 10) }}",
    "filled": "{{ messages[0]['content'].zfill(10 ** 10) }}",
    "indented": "{{ messages|tojson(indent=10 ** 10) }}",
    "batched": "{{ messages|batch(10 ** 10, 'x')|list }}",
    "replaced": "{{ ('a' * 10 ** 5)|replace('', 'b' * 10 ** 5) }}",
    "filler": "{{ lipsum(n=10 ** 9) }}",
    "shared lists": GROWING.format(start="[1]", step="[ns.x, ns.x]") + "{{ ns.x }}",
    "shared tuples": GROWING.format(start="(1,)", step="(ns.x, ns.x)") + "{{ {ns.x: 1}|length }}",
    "sorted for ever": "{% for a in range(9999) %}{{ range(99999)|map('string')|sort|first }}{% endfor %}",
    "much text": GOOD + "{% for a in range(99) %}{{ 'x' * 10 ** 6 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "many signs": "{{ " + "-" * 90000 + "1 }}",
    "much source": "x" * (MAX_SOURCE_CHARS + 1),
    "no Jinja": "{% for",
    "another file": "{% include '/etc/passwd' %}",
    "the insides of Python": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
    "an error": "{{ raise_exception('no') }}",
}


@pytest.fixture
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


@pytest.mark.parametrize("name", WORST)
def test_the_worst_templates_end_soon_with_an_error(name: str, renderer: TemplateRenderer) -> None:
    chat = HELLO * (4 if name == "a loop over messages" else 1)
    before = psutil.Process().memory_info().rss
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match="the chat template"):
        renderer.render(ChatTemplate(WORST[name]), chat)
    assert time.monotonic() - start < 15.0  # a second of processor time, on a machine that has other work
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert renderer.render(ChatTemplate(GOOD), HELLO) == "user: hello\n"


def test_a_template_that_takes_long_delays_no_other(renderer: TemplateRenderer) -> None:
    good, slow = ChatTemplate(GOOD), ChatTemplate(WORST["nested loops"])
    renderer.check(good)
    endless = renderer.submit(slow, HELLO)
    assert [renderer.render(good, HELLO) for _ in range(20)] == ["user: hello\n"] * 20
    assert not endless.done()
    with pytest.raises(ChatTemplateError, match="1 s of processor time"):
        endless.result()


def test_a_rendering_that_nobody_waits_for_is_not_begun(renderer: TemplateRenderer) -> None:
    slow = ChatTemplate(WORST["a loop over messages"])
    renderer.check(slow)
    first = renderer.submit(slow, HELLO * 4)
    second = renderer.submit(slow, HELLO)
    assert second.cancel()
    with pytest.raises(ChatTemplateError):
        first.result()


def test_a_template_that_cannot_be_used_is_tried_once(renderer: TemplateRenderer) -> None:
    bad = ChatTemplate(WORST["nested loops"])
    with pytest.raises(ChatTemplateError):
        renderer.check(bad)
    start = time.monotonic()
    for _ in range(100):
        with pytest.raises(ChatTemplateError, match="1 s of processor time"):
            renderer.render(bad, HELLO)
    assert time.monotonic() - start < 5.0


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE and "eda.adapters.templates.worker" in child.cmdline()
    ]


def test_processes_are_few_and_end_with_the_renderer() -> None:
    renderer, before = TemplateRenderer(), len(children())
    for number in range(MAX_PROCESSES + 3):
        assert renderer.render(ChatTemplate(f"{number} {GOOD}"), HELLO) == f"{number} user: hello\n"
    assert len(children()) <= before + MAX_PROCESSES + 1  # one may be about to end
    renderer.close()
    assert len(children()) <= before
    assert renderer.render(ChatTemplate(GOOD), HELLO) == "user: hello\n"
    renderer.close()


def test_a_killed_process_is_started_again(renderer: TemplateRenderer) -> None:
    known = {child.pid for child in children()}
    renderer.check(ChatTemplate(GOOD))
    [child] = [child for child in children() if child.pid not in known]
    child.kill()
    child.wait(5)
    assert renderer.render(ChatTemplate(GOOD), HELLO) == "user: hello\n"


def test_keys_in_the_environment_stay_out_of_the_process(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDA_ADMIN_KEY", "secret")
    known = {child.pid for child in children()}
    renderer.check(ChatTemplate(GOOD))
    [child] = [child for child in children() if child.pid not in known]
    assert "EDA_ADMIN_KEY" not in child.environ()


def test_long_chats_and_odd_characters_pass(renderer: TemplateRenderer) -> None:
    content = "Wörter 漢字 \U0001f642 \ud800 \u2028\n" * 50_000
    assert renderer.render(ChatTemplate(GOOD), [{"role": "user", "content": content}]) == f"user: {content}\n"
