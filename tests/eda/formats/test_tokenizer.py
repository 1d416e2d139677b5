"""Tokens are those of ``tokenizer.json``, special tokens those of the configuration, and a fine-tune brings its own."""

import json
import logging
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from eda.backends.loading import load_fine_tune, load_target
from eda.errors import CheckpointError, MismatchError
from eda.formats.tokenizer import TextTokenizer
from eda.formats.tokenizer_files import load_tokenizer
from eda.models.target import TargetModel
from tests.support.tiny import edit_json, tiny_lora, tiny_target, tiny_tokenizer

TEXTS = [
    "Tom's 3 boxes hold 1234567 pens.",
    "  two  spaces\n\n\nand lines\t",
    "Wörter café cafe\u0301 漢字 \U0001f642",
    "don't DON'T we'll x<|end|>y",
    "def f(x):\n        return x  # 0x1F",
]
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", None]
CLASSES = ["PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer", None]


def byte_level(file: Path, *, bos: bool = False) -> Tokenizer:
    """A tokenizer with a pre-tokenizer of its own: digits one by one, capitals apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z]"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=[AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 0)]
        )
    tokenizer.save(str(file))
    return tokenizer


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(("model_type", "tokenizer_class"), list(product(MODEL_TYPES, CLASSES)))
def test_tokens_are_those_of_the_file(
    model_type: str | None, tokenizer_class: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    byte_level(tmp_path / "tokenizer.json")
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    write_json(
        tmp_path / "tokenizer_config.json",
        config | ({} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}),
    )
    if model_type is not None:
        write_json(tmp_path / "config.json", {"model_type": model_type})
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    with caplog.at_level(logging.WARNING, "eda.formats.tokenizer"):
        tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        expected = file.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(expected) == file.decode(expected)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (0, 1, {1})
    try:
        theirs = AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer
    except Exception:
        assert "transformers cannot load this tokenizer" in caplog.text
    else:
        differ = any(theirs.encode(t).ids != file.encode(t).ids for t in TEXTS)
        assert ("does not follow tokenizer.json" in caplog.text) == differ


def test_some_of_these_differ_in_transformers(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    file = byte_level(tmp_path / "tokenizer.json")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert any(theirs.encode(text, add_special_tokens=False) != file.encode(text).ids for text in TEXTS)


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
@pytest.mark.parametrize("in_file", [True, False])
@pytest.mark.parametrize("stated", [None, True, False])
def test_a_text_begins_and_ends_as_transformers_reads_the_configuration(
    tokenizer_class: str, in_file: bool, stated: bool | None, tmp_path: Path
) -> None:
    file = byte_level(tmp_path / "tokenizer.json", bos=in_file)
    config: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<|start|>",
        "eos_token": "<|end|>",
    }
    flags = {} if stated is None else {"add_bos_token": stated, "add_eos_token": stated}
    write_json(tmp_path / "tokenizer_config.json", config | flags)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    whole, plain = theirs.encode("a b"), theirs.encode("a b", add_special_tokens=False)
    begins, ends = whole[0] != plain[0], whole[-1] != plain[-1]
    ids = file.encode("a b", add_special_tokens=False).ids
    assert load_tokenizer(tmp_path).encode("a b") == [*([0] * begins), *ids, *([1] * ends)]
    assert begins or not in_file or stated is not None


def test_special_tokens_that_the_file_has_as_plain_ones(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {"<|stop|>": 258}
    write_json(tmp_path / "tokenizer.json", content)
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|stop|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {258}
    assert tokenizer.encode("a<|stop|>", add_special_tokens=False)[-1] == 258
    assert tokenizer.decode([*tokenizer.encode("a", add_special_tokens=False), 258]) == "a"


def test_tokens_that_stand_beside_the_file(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 258})
    edit_json(tmp_path / "tokenizer_config.json", eos_token="<|im_end|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == {258}
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [258]
    write_json(tmp_path / "added_tokens.json", {"<|im_end|>": 300})
    with pytest.raises(CheckpointError, match=r"'<\|im_end\|>' the id 300; with tokenizer.json it is 258"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "holds no tokenizer that can be loaded"),
        ("tokenizer.json", None, "tokenizer.json is needed"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<none>"}',
            "eos_token '<none>', which tokenizer.json does not",
        ),
        ("tokenizer_config.json", "[]", "an object was expected"),
        ("generation_config.json", '{"eos_token_id": [1, "x"]}', "eos_token_id 'x'; a token id, or a list"),
        ("generation_config.json", '{"eos_token_id": -1}', "eos_token_id -1"),
    ],
)
def test_unusable_files_are_refused_by_name(
    file: str, content: str | None, message: str, tmp_path: Path
) -> None:
    tiny_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


# --- what fine-tunes bring ---

OWN_TEMPLATE = "{% for m in messages %}<own>{{ m['content'] }}{% endfor %}{{ eos_token }}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    """A vocabulary of 320 rows, of which the tokenizer uses 258."""
    directory = tiny_target(tmp_path_factory.mktemp("base"), tokenizer=True)
    return load_target(directory)


@pytest.fixture(params=["lora", "full"])
def directory(request: pytest.FixtureRequest, base: TargetModel, tmp_path: Path) -> Path:
    """A fine-tune without a tokenizer."""
    assert base.path is not None
    if request.param == "lora":
        return tiny_lora(tmp_path / "tuned", base.path, targets=("q_proj",))
    return tiny_target(tmp_path / "tuned", seed=5)


def tokenizer_of(directory: Path, base: TargetModel) -> TextTokenizer:
    tokenizer = load_fine_tune(directory, base, "tuned").tokenizer
    assert tokenizer is not None
    return tokenizer


def test_a_fine_tune_that_brings_the_same_has_none_of_its_own(base: TargetModel, directory: Path) -> None:
    assert base.path is not None
    (directory / "generation_config.json").unlink(missing_ok=True)
    assert load_fine_tune(directory, base, "tuned").tokenizer is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base.path / name, directory / name)
    assert load_fine_tune(directory, base, "tuned").tokenizer is None


def test_a_template_alone_goes_with_the_tokens_of_the_base(base: TargetModel, directory: Path) -> None:
    assert base.path is not None
    (directory / "chat_template.jinja").write_text(OWN_TEMPLATE, encoding="utf-8")
    tokenizer = tokenizer_of(directory, base)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<own>hi</s>"
    assert tokenizer.encode("hi") == load_tokenizer(base.path).encode("hi")
    assert 257 in tokenizer.eos_ids


def test_added_tokens_and_end_tokens_within_the_padding_are_served(
    base: TargetModel, directory: Path
) -> None:
    tiny_tokenizer(directory)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    backend.save(str(directory / "tokenizer.json"))
    edit_json(directory / "tokenizer_config.json", eos_token="<|im_end|>", chat_template=...)
    write_json(directory / "generation_config.json", {"eos_token_id": [257, 300]})
    tokenizer = tokenizer_of(directory, base)
    assert tokenizer.encode("<|im_start|>a", add_special_tokens=False)[0] == 258
    assert tokenizer.eos_ids == {257, 259, 300}
    assert tokenizer.special_ids >= {258, 259}
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(chat) == "user: hi\nassistant: "  # the base's template


def test_special_tokens_without_a_tokenizer_are_those_of_the_base_by_other_names(
    base: TargetModel, directory: Path
) -> None:
    write_json(directory / "tokenizer_config.json", {"eos_token": {"content": "<s>"}, "pad_token": "</s>"})
    (directory / "generation_config.json").unlink(missing_ok=True)
    tokenizer = tokenizer_of(directory, base)
    assert tokenizer.eos_ids == {256}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "</s>"}


@pytest.mark.parametrize("kind", ["token", "end token"])
def test_tokens_outside_of_the_embedding_are_refused_by_name(
    base: TargetModel, directory: Path, kind: str
) -> None:
    if kind == "token":
        tiny_tokenizer(directory)
        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        backend.add_tokens([f"<|extra{number}|>" for number in range(63)])  # ids 258 to 320
        backend.save(str(directory / "tokenizer.json"))
        message = r"no room for: '<\|extra62\|>' \(320\); its embedding ends at 319"
    else:
        write_json(directory / "generation_config.json", {"eos_token_id": [257, 320]})
        message = "no room for: the end token 320"
    with pytest.raises(MismatchError, match=message):
        load_fine_tune(directory, base, "tuned")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "another pre_tokenizer than the base's"),
        ("normalizer", {"type": "Prepend", "prepend": "x" * 1000}, "another normalizer than the base's"),
        (
            "pre_tokenizer",
            {
                "type": "Split",
                "pattern": {"Regex": "(.*)*(.*)*(.*)*x$"},
                "behavior": "Isolated",
                "invert": False,
            },
            r"the pattern '\(\.\*\)\*.*which the base's does not have",
        ),
        (
            "normalizer",
            {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"Regex": "a("}, "content": "b"}],
            },
            r"the pattern 'a\('",
        ),
    ],
)
def test_rules_of_a_stranger_do_not_cut_text(
    base: TargetModel, directory: Path, part: str, change: dict[str, Any], message: str
) -> None:
    tiny_tokenizer(directory)
    edit_json(directory / "tokenizer.json", **{part: change})
    with pytest.raises(MismatchError, match=message):
        load_fine_tune(directory, base, "tuned")


def test_the_same_rules_in_an_older_spelling_are_the_same(base: TargetModel, directory: Path) -> None:
    tiny_tokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for name in ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"):
        content["model"].pop(name, None)
    content["pre_tokenizer"].pop("use_regex", None)
    content["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    write_json(directory / "tokenizer.json", content)
    assert base.path is not None
    own, bases = tokenizer_of(directory, base), load_tokenizer(base.path)
    assert own.encode("four tokens") == bases.encode("four tokens")
