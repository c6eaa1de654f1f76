"""Config files that would take Python down, or the machine: each is refused in our words, with the file's name."""

from pathlib import Path

import pytest

from flows.planning import config_file
from schemas.errors import StageError

LAUGHS = ["a: &a [x, x, x, x, x, x, x, x, x]"]
LAUGHS += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]

VALUES = [
    "2024-13-45",
    "2024-01-01T25:00:00",
    "9" * 5000,
    "0x" + "f" * 100_000,
    "!!int x",
    "!!int",
    "!!int 0x",
    "!!float x",
    "!!float",
    "!!bool x",
    "!!timestamp x",
    "!!binary x",
    "!!omap x",
    "!!pairs [x]",
    "!!python/name:os.system x",
    "!<x> y",
    "? [a]",
    "? {a: 1}",
    "[" * 20_000,
    "{a: " * 5000,
    "- " * 5000,
    "&x [*x]",
    "*nothing",
    "{<<: 5}",
    "[" + "1," * 30_000 + "]",
    "&t " + "y" * 100_000 + "\nb: [" + "*t," * 1000 + "]",
    "x" * (config_file.BYTES + 1),
    "\x00",
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:20])
def test_a_hostile_value_is_refused(value: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(f"name: {value}\n")
    with pytest.raises(StageError) as refusal:
        config_file.read(file)
    told = str(refusal.value)
    assert told.startswith(str(file)) and len(told) < 500 and "\n" not in told
    with pytest.raises(StageError, match=r"--set name="):
        config_file.apply({}, f"name={value}")


@pytest.mark.parametrize(
    "text",
    ["\n".join([*LAUGHS, "name: *i"]), "".join(f"{' ' * i}a:\n" for i in range(500)), "*a : 1", "? [a]\n: 1"],
    ids=["laughs", "deep", "alias as a key", "list as a key"],
)
def test_a_hostile_text_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    with pytest.raises(StageError, match=r"my\.yaml"):
        config_file.read(file)


def test_where_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("name: x\nalign:\n  dpo: {beta: !!float x}\n")
    with pytest.raises(StageError, match=r"my\.yaml:3:15: 'x' cannot be read as float"):
        config_file.read(file)


def test_what_people_write_is_read(tmp_path: Path) -> None:
    """Aliases, merged keys, a long template, many methods."""
    many = "\n".join(f"  m{i}: {{<<: *one, beta: 0.{i + 1}}}" for i in range(300))
    text = f"align:\n  dpo: &one {{method: dpo, batch_size: 4}}\n{many}\nt: {'x' * 50_000}\nlr: 1e-5\non: on"
    (tmp_path / "my.yaml").write_text(text)
    raw = config_file.read(tmp_path / "my.yaml")
    assert raw["align"]["m1"] == {"method": "dpo", "batch_size": 4, "beta": 0.2} and len(raw["align"]) == 301
    assert raw["lr"] == 1e-5 and raw["on"] == "on" and len(raw["t"]) == 50_000


WHOLE = """
name: x
model: {path: MODEL}
data: {preference: {path: DATA, kind: preference}}
align: {dpo: {}}
reward_model: REWARD
evaluate: {judge: {judge: reward, model: JUDGE}}
"""


@pytest.mark.parametrize("path", ["r" * 5000, "/" + "x/" * 3000, "~" + "u" * 300, "é" * 200, '"a\\0b"', '"\\ud800"'])
@pytest.mark.parametrize("place", ["MODEL", "DATA", "REWARD", "JUDGE"])
def test_a_path_that_no_disk_can_hold(place: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(WHOLE.replace(place, path))
    with pytest.raises(StageError) as refusal:
        config_file.load(str(tmp_path / "my.yaml"))
    assert len(str(refusal.value)) < 2000


@pytest.mark.parametrize("name", ["r" * 5000, "/" + "x/" * 3000])
def test_a_name_of_a_config_that_no_disk_can_hold(name: str) -> None:
    with pytest.raises(StageError, match="neither a preset nor a file"):
        config_file.load(name)


@pytest.mark.parametrize("judge", ["[a]", "{judge: [a]}", "{judge: {a: b}}"])
def test_a_judge_that_is_no_name(judge: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(WHOLE.replace("{judge: reward, model: JUDGE}", judge))
    with pytest.raises(StageError, match=r"evaluate\.judge"):
        config_file.load(str(tmp_path / "my.yaml"))


def test_of_very_many_mistakes_the_first_are_told(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("\n".join(f"k{i}: 1" for i in range(5000)))
    with pytest.raises(StageError) as refusal:
        config_file.load(str(tmp_path / "my.yaml"))
    assert len(str(refusal.value).splitlines()) == 51 and "and 4954 more mistakes" in str(refusal.value)
