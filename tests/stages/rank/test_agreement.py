"""How far people agree: Krippendorff's alpha for ordinal values, by hand and as published."""

import random
from pathlib import Path

import pytest

from stages.commands.rank import rows
from stages.commands.rank.agreement import alpha
from tests.support.ranking import FRUIT, TREE, say, session, told, write


def test_alpha_worked_by_hand() -> None:
    """Two people, three things: (1, 1), (2, 3), (3, 3). Margins n1 = 2, n2 = 1, n3 = 3, n = 6.

    d12 = (1 + 1/2)^2 = 9/4, d23 = (1/2 + 3/2)^2 = 4, d13 = (1 + 1 + 3/2)^2 = 49/4.
    Observed: o23 = o32 = 1, so 2 * 4 = 8. Expected: 2 (2 * 9/4 + 3 * 4 + 6 * 49/4) = 180.
    alpha = 1 - (6 - 1) * 8 / 180 = 7/9.
    """
    assert alpha([[1, 1], [2, 3], [3, 3]]) == pytest.approx(7 / 9)
    assert alpha([[10, 10], [20, 500], [500, 500]]) == pytest.approx(7 / 9)  # only the order counts
    assert alpha([[1, 1], [2, 3], [3, 3], [2]]) == pytest.approx(7 / 9)  # what one person judged alone does not
    assert alpha([[1, 2], [2, 1]]) == pytest.approx(1 - 3 * 16 / 32)  # d12 = (1 + 1)^2, o12 = o21 = 2
    assert alpha([]) is alpha([[1, 1], [1, 1]]) is None


def test_alpha_of_a_published_example() -> None:
    """Krippendorff 2011: four observers, twelve units, values missing; ordinal alpha 0.815."""
    observers = (
        (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
        (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
        (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
        (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
    )
    units = [[value for value in unit if value is not None] for unit in zip(*observers, strict=True)]
    assert alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.815, abs=5e-4)


def test_people_who_rank_by_chance_do_not_agree() -> None:
    """Rankings of four by chance: alpha has mean 0; with 3 * 300 rankings its spread is about 0.03."""
    draw = random.Random(0)
    units = [list(unit) for _ in range(300) for unit in zip(*(draw.sample(range(4), 4) for _ in range(3)), strict=True)]
    value = alpha(units)
    assert value is not None and abs(value) < 0.1


def test_ranks_that_are_compared_share_their_mean_where_they_are_tied(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", [FRUIT, TREE])
    for name, own in {"anna": [[[2], [0, 1]], [[0], [1]]], "ben": [[[0], [1], [2]], None]}.items():
        for number, verdict in enumerate(own):
            say(session(file, name), number, verdict)
    person = session(file)
    assert sorted(rows.units(told(person))) == [[1.0, 3.0], [2.5, 1.0], [2.5, 2.0]]
    lines = rows.summary(person.items, told(person))
    assert lines[:2] == [
        "anna: 2 of 2 judged, 0 skipped, median 1.0 s per item",
        "ben: 1 of 2 judged, 1 skipped, median 1.0 s per item",
    ]
    # Middles of 1, 1, 2, 2.5, 2.5, 3: 1, 2.5, 4, 5.5. Observed 2 (4.5^2 + 3^2 + 1.5^2) = 63; expected, over all ordered
    # pairs, 2 (2 * 1.5^2 + 4 * 3^2 + 2 * 4.5^2 + 2 * 1.5^2 + 3^2 + 2 * 1.5^2) = 198. alpha = 1 - 5 * 63 / 198.
    assert lines[2].startswith("agreement on the 1 items that several judged: Krippendorff's alpha -0.59 ")


def test_a_pair_is_one_thing_that_people_agree_on(tmp_path: Path) -> None:
    """Its second answer says what the first does; a tie is between winning and losing. Of thumbs up is 1."""
    file = write(tmp_path / "rows.jsonl", [TREE])
    for name, verdict in {"anna": [[0], [1]], "ben": [[1], [0]], "cid": [[0, 1]]}.items():
        say(session(file, name, "pairs"), 0, verdict)
    assert rows.units(told(session(file, form="pairs"))) == [[1.0, 2.0, 1.5]]
    thumbs = write(tmp_path / "thumbs.jsonl", [TREE])
    for name, verdict in {"anna": "up", "ben": "down"}.items():
        say(session(thumbs, name, "thumbs"), 1, verdict)
    assert rows.units(told(session(thumbs, form="thumbs"))) == [[1.0, 0.0]]
