"""The ingredients of the page of costs: bytes against the formula, fits with known answers, tables from known rows."""

import json
from pathlib import Path

import pytest

from ivfast.bench.harness import page
from ivfast.bench.studies import communication, reach, scale

N, D, RANKS = 48, 8, 2
BLOCK = N // RANKS * D * 4
KEYS = [(case.op, case.exchange, what) for case in communication.CASES for what in ("forward", "backward")]


@pytest.fixture(scope="module")
def exchanged():
    """The bytes counted by each of two ranks, per call."""
    found = communication.measure(RANKS, N, D, steps=(("wae-mmd", "digits"),))
    assert found[0]["bytes_per_s"] > 0
    return [{(row["what"], row["exchange"], row["pass"]): row for row in rank["rows"]} for rank in found]


@pytest.mark.parametrize("key", KEYS, ids=" ".join)
def test_a_rank_sends_what_the_formula_says(exchanged, key):
    for rows in exchanged:
        assert rows[key]["counted"] == rows[key]["formula"]


def test_what_gloo_writes_is_what_was_counted(exchanged):
    """Blocks are written once, with headers of at most a hundred bytes per message, and twice by its reduce-scatter."""
    if communication.written() is None:
        pytest.skip("this system does not count what a process writes")
    for rows in exchanged:
        for key in (("gather_rows", "gather", "forward"), ("svgd_direction", "ring", "backward")):
            assert rows[key]["counted"] <= rows[key]["written"] < rows[key]["counted"] + 1000
        scattered = rows["gather_rows", "gather", "backward"]
        assert scattered["written"] >= scattered["counted"]


def test_what_two_ranks_send_in_bytes(exchanged):
    """Independent of the formulas: half of the rows, or two halves, and some scalars."""
    (rows, _) = exchanged
    assert rows["gather_rows", "gather", "forward"]["counted"] == BLOCK
    assert rows["gather_rows", "gather", "backward"]["counted"] == BLOCK
    assert rows["svgd_direction", "ring", "backward"]["counted"] == 2 * BLOCK
    assert rows["mmd", "ring", "backward"]["counted"] == 4
    assert rows["as_distance", "ring", "backward"]["counted"] == 4 * BLOCK + 4


def test_a_step_of_training_sends_its_gradients(exchanged):
    for rows in exchanged:
        row = rows["wae-mmd, digits", "reduce", "a step's gradients"]
        assert row["counted"] == row["formula"] == 2 * (RANKS - 1) / RANKS * 4 * row["parameters"]
        assert row["whole_step"] > row["counted"]


def test_tables_are_read_as_they_were_written():
    first, second = [["n", "ms"], ["64", "0.1"], ["", "–"]], [["call"], ["a, b"]]
    template = "# T\n\n<!-- a -->\n<!-- /a -->\ntext | with a bar\n\n<!-- b -->\n\n| old |\n\n<!-- /b -->\nend\n"
    filled = page.write(template, {"a": page.table(first), "b": f"x:\n\n{page.table(second)}\n\n{page.table(first)}"})
    assert page.tables(page.read(filled, "a")) == [first]
    assert page.tables(page.read(filled, "b")) == [second, first]
    assert page.write(filled, {"a": page.table(first)}) == filled
    assert [line for line in filled.splitlines() if "text" in line or line in ("# T", "end")] == [
        "# T",
        "text | with a bar",
        "end",
    ]
    with pytest.raises(ValueError, match="<!-- c -->"):
        page.write(template, {"c": ""})


@pytest.mark.parametrize(("slope", "start", "power"), [(3e-9, 2e-5, 2), (4e-4, 0.02, 1), (1e-9, 0.0, 2)])
def test_a_fit_finds_slope_and_start(slope, start, power):
    its = reach.fit([(x, slope * x**power + start) for x in (64, 256, 1024, 4096)], power)
    assert its.slope == pytest.approx(slope, rel=1e-6)
    assert its.start == pytest.approx(start, rel=1e-6, abs=1e-12)
    assert its.error < 1e-6


def test_reach_solves_the_model():
    a = reach.Fit(1e-9, 1e-3, 2, 0.0)
    seconds = reach.direction_seconds(a, 4, 1e9, d=64)
    assert seconds(1000.0) == pytest.approx(1e-9 * 1000**2 / 4 + 1e-3 + 3 / 4 * 1000 * 64 * 4 / 1e9)
    assert seconds(reach.largest(seconds, 1.0)) == pytest.approx(1.0)
    assert reach.largest(seconds, 1e-4) == 0


def test_ten_million_particles_on_eight_gpus():
    """By hand: 10¹⁴ pairs of 256 flop over 8 · 67·10¹² flop/s; blocks of 1.25·10⁶ × 64 floats, 320 MB."""
    its = reach.on_gpus(1e7, 8)
    assert its.pairs == 1.25e13
    assert its.peak == pytest.approx(47.8, abs=0.1)
    assert its.streamed - its.peak == pytest.approx(194, abs=1)
    assert its.sent == pytest.approx(7 * 320e6)
    assert its.link == pytest.approx(5e-3, rel=0.01)
    assert 8 * 320e6 < its.memory < 4e9


def test_the_page_is_that_of_its_report(tmp_path, monkeypatch):
    """Tables and picture from rows; the table contains every time, in ms."""
    monkeypatch.chdir(Path(__file__).parents[1])
    names = (*scale.calls_of(2, 2),)
    rows = [
        {"against": against, "at": at, "what": name, "us": 1e-3 * at**2 + k + 1.0, "turns": 3, "threads": 1}
        for against, points, every in (
            ("n", scale.NS, names),
            ("d", scale.DS, names),
            ("batch", scale.BATCHES, scale.SYSTEMS),
        )
        for k, name in enumerate(every)
        for at in points
    ]
    exchanged = [
        {"what": f"{system}, mnist", "exchange": "reduce", "pass": "a step's gradients", "ranks": ranks, "formula": 8.0, "counted": 8.0, "written": None, "parameters": 7}
        for system in scale.SYSTEMS
        for ranks in scale.RANKS
    ]  # fmt: skip
    session = {
        "date": "today",
        "versions": {"python": "3", "torch": "2"},
        "minutes": 1.0,
        "load": [0.5, 1.0],
        "left_out": [],
        "bytes_per_s": 1e9,
    }
    its = {"name": "here", "cpu": "a CPU", "instructions": "AVX512", "threads": 1}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"machine": its, "session": session, "rows": rows, "communication": exchanged}))
    scale.main(["--redraw", str(path), "--out", str(tmp_path)])
    text = (tmp_path / "scale.md").read_text()
    against_n, against_d, against_batch = page.tables(page.read(text, "curves"))
    assert against_n[0] == ["", *map(str, scale.NS)]
    assert [row[0] for row in against_n[1:]] == [row[0] for row in against_d[1:]] == list(names)
    assert against_n[1][1] == "0.005"  # 4.096 + 1 µs
    assert against_batch[2][-1] == "0.264"  # 262.1 + 2 µs
    (bytes_,) = page.tables(page.read(text, "communication"))
    assert bytes_[1][3:6] == ["8", "8", "–"]
    (fits, reached) = page.tables(page.read(text, "reach"))
    assert fits[1][1] == "1 ns per pair"
    assert [row[0] for row in reached[1:]] == ["1", "2", "4", "8"]
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    assert scale.main(["--redraw", str(path), "--out", str(tmp_path)]) is None
    assert (tmp_path / "scale.md").read_text() == text


def test_calls_that_the_time_is_too_short_for_are_left_out():
    assert scale.affordable({"a": 1.0, "b": 3.0, "c": 0.0}, 3.5) == {"a", "c"}
    assert scale.affordable({"a": 2.0}, 3.5) == set()
