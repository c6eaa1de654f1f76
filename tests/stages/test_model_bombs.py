"""Model folders and templates without end, too large for memory, or broken: each is refused, with a fix."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from schemas.config import BaseParams
from schemas.errors import StageError
from schemas.model_folder import why_unusable
from stages import base
from stages.engine.data import codec
from stages.engine.data.codec import Codec
from stages.engine.models.loading import load_policy, load_scorer
from tests.support import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.model_folder(tmp_path / "model")


def build(folder: Path, **params: Any) -> None:
    base.build(BaseParams(path=str(folder), **params), 0, folder.with_name("out"))


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(StageError) as refusal:
        call()
    told = str(refusal.value)
    assert "Fix:" in told and len(told) < 1500
    return told


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [LOOP, "{{ 10 ** (10 ** 9) }}", "{{ 'a' * 20000000000 }}", "{{ 'a'.center(20000000000) }}", DOUBLE],
    ids=["loop", "power", "product", "width", "doubling"],
)
def test_a_template_without_end(template: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "RENDER_SECONDS", 1.0)
    assert "it takes more than" in refused(lambda: build(folder, chat_template=template))
    # In a folder that is used as it is, and only where a row brings it about: in its second message.
    late = "{{ messages[0]['content'] }}{% if messages|length > 2 %}" + template + "{% endif %}"
    tokenizer = Codec.load(folder).tokenizer
    tokenizer.chat_template = late
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    assert "it takes more than" in refused(lambda: Codec(tokenizer).prompts([chat, chat[:1]]))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert "it takes more than" in refused(lambda: Codec.load(folder))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ {}['x']['y'] }}",
        "{{ messages[9]['content'] }}",
        "{{ 'x' + 1 }}",
        "{{ 'a'.encode('zz') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_template_that_fails(template: str, folder: Path) -> None:
    refused(lambda: build(folder, chat_template=template))
    tokenizer = Codec.load(folder).tokenizer
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert "template" in refused(lambda: Codec.load(folder))


def test_a_template_file_that_is_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe{{")
    (tmp_path / "long").write_text("x" * (2 << 20))
    for name in ("binary", "long"):
        assert str(tmp_path / name) in refused(lambda name=name: build(folder, chat_template=str(tmp_path / name)))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": 10**8},
        {"n_layer": 10**8},
        {"text_config": {"num_hidden_layers": 10**8}},
        {"num_hidden_layers": 1000, "num_local_experts": 1000},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9},
    ],
)
def test_more_parts_than_any_model_has(values: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", **values)
    problem = why_unusable(folder, scorer=False)
    assert problem is not None and "100000" in problem[0]
    for load in (build, load_policy, load_scorer):
        assert "100000" in refused(lambda load=load: load(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -1},
        {"hidden_act": "none"},
        {"vocab_size": "x"},
        {"architectures": 5},
        {"architectures": [1]},
        {"text_config": [1]},
        {"id2label": 5},
        {"rope_parameters": 5},
        {"model_type": ["llama"]},
        {"model_type": {"a": 1}},
        {"num_key_value_heads": 0},
    ],
)
def test_a_config_that_contradicts_itself(values: dict[str, Any], folder: Path) -> None:
    """Refused, or taken by those that do not read the value; nothing else."""
    change(folder / "config.json", **values)
    for use in (build, load_policy, load_scorer, lambda folder: why_unusable(folder, scorer=False)):
        try:
            use(folder)
        except StageError as error:
            assert "Fix:" in str(error)


DEEP = '{"a": ' * 100_000


@pytest.mark.parametrize(
    "content", [DEEP, "[1]", "\ud800", "{", '"x"'], ids=["deep", "list", "surrogate", "cut", "text"]
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_cannot_be_read(name: str, content: str, folder: Path) -> None:
    (folder / name).write_bytes(content.encode(errors="surrogatepass"))
    if name == "config.json" or name == "tokenizer.json":
        assert why_unusable(folder, scorer=False) is not None
        refused(lambda: build(folder))
    for use in (Codec.load, load_policy):
        try:
            use(folder)
        except StageError as error:
            assert "Fix:" in str(error)


def gguf(*, kv: int = 0, tensors: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, kv) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
LAYERS = text(b"llama.block_count") + struct.pack("<II", 4, 10**8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF\x03\x00",
        b"not one",
        gguf(kv=1),
        gguf(kv=2**60),
        gguf(tensors=2**60),
        gguf(kv=1, rest=b"\xff"),
        gguf(kv=1, rest=struct.pack("<Q", 2**60) + b"abc"),
        gguf(kv=1, rest=text(b"a") + struct.pack("<I", 99)),
        gguf(kv=1, rest=text(b"a") + struct.pack("<IIQ", 9, 4, 2**60)),
        gguf(kv=1, rest=ARCHITECTURE),
        gguf(kv=1, rest=text(b"\xff\xfe") + struct.pack("<II", 4, 1)),
        gguf(kv=2, rest=ARCHITECTURE + LAYERS),
    ],
    ids=range(14),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where time is up in a finalizer
def test_a_broken_gguf_head(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "GGUF_SECONDS", 2.0)
    pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    (tmp_path / "model.gguf").write_bytes(content)
    refused(lambda: build(tmp_path / "model.gguf"))
