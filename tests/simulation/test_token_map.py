"""Where tokens went, against an even share."""

from __future__ import annotations

import json
import re

import pytest
from told_runs import CLIENTS, make_events, make_run

from molehill.errors import DataError
from molehill_simulation.report import write_report
from molehill_simulation.token_map import token_map


def routed(**tokens: dict[str, float]) -> list[dict]:
    return [
        {"event": "evaluation", "client": client, "stages": {}, "tokens": counts} for client, counts in tokens.items()
    ]


def test_shares_are_told_from_an_even_one():
    tokens = {"c10": {"e0": 10.0, "e10": 0.0, "e2": 30.0, "shared0": 40.0}, "c9": {"e0": 5.0, "e2": 5.0, "e10": 5.0}}
    found = token_map(routed(**tokens), {"c9", "c10"})
    assert (found.experts, found.shared, found.held_out, found.alike) == (("e0", "e2", "e10"), ("shared0",), True, True)
    assert found.even == pytest.approx([1 / 3] * 3)
    (first, flat), (second, cells) = found.rows
    assert (first, second) == ("c9", "c10")
    assert [cell.deep for cell in flat] == pytest.approx([0.0] * 3)
    assert {cell.points for cell in flat} == {"±0"}
    assert [cell.share for cell in cells] == [0.25, 0.75, 0.0]
    assert [cell.points for cell in cells] == ["\N{MINUS SIGN}8.3", "+41.7", "\N{MINUS SIGN}33.3"]
    assert found.most == pytest.approx(0.75 - 1 / 3)
    assert [cell.deep for cell in cells] == pytest.approx([0.25, 1.0, 1.0])
    assert [client for client, _ in token_map(routed(**tokens), {"c10"}).rows] == ["c10"]


def test_small_deviations_stay_pale():
    ((_, cells),) = token_map(routed(c={"e0": 11.0, "e1": 9.0}), {"c"}).rows
    assert [cell.deep for cell in cells] == pytest.approx([0.1, 0.1])


def test_an_expert_that_is_not_at_every_site_would_get_less():
    tokens = routed(c={"e0": 2.0, "e1": 1.0, "e2": 1.0})
    sites = {"e0": {"a": 4, "b": 4}, "e1": {"a": 4}, "e2": {"b": 4}, "shared0": {"a": 4}}
    found = token_map(tokens, {"c"}, sites)
    assert found.even == pytest.approx([0.5, 0.25, 0.25])
    assert not found.alike
    assert [cell.deep for cell in found.rows[0][1]] == pytest.approx([0.0] * 3)
    assert token_map(tokens, {"c"}, {"e0": {"a": 4}}).even == pytest.approx([1 / 3] * 3)  # of other experts


def test_where_there_is_no_choice_there_is_no_map():
    assert token_map(routed(c={"e0": 5.0, "shared0": 5.0}), {"c"}) is None
    assert token_map([], set()) is None


def test_the_page_has_a_legend_with_units_and_both_directions(tmp_path):
    text = write_report(make_run(tmp_path, make_events(CLIENTS))).read_text("utf-8")
    section = text.split("Where tokens went</h2>")[1].split("</section>")[0]
    assert "an even share (25.0%)" in " ".join(section.split())
    assert re.search(r"no tokens</span><span>even share</span><span>\+\d+\.\d points</span>", section)
    cells = re.findall(
        r'<td class="(over|under)" style="--a:([\d.]+)">(\d+)%<small>([+\N{MINUS SIGN}±][\d.]+)', section
    )
    assert len(cells) == 4 * len(CLIENTS)
    assert max(float(deep) for _, deep, _, _ in cells) == 1.0
    assert all((side == "over") == points.startswith("+") for side, _, _, points in cells if points != "±0")


def test_the_sites_are_those_of_the_adapter(tmp_path):
    folder = make_run(tmp_path, make_events(CLIENTS))
    (folder / "adapter").mkdir()
    path = folder / "adapter" / "molora.json"
    path.write_text(json.dumps({"ranks": {f"e{i}": {"a": 4, **({"b": 4} if i < 2 else {})} for i in range(4)}}))
    seen = write_report(folder).read_text("utf-8")
    assert "which differs where an expert is not at every site" in seen
    assert '<th scope="row">even share</th><td>37.5%</td><td>37.5%</td><td>12.5%</td>' in seen
    path.write_text('{"ranks": 3}')
    with pytest.raises(DataError, match=r"molora\.json"):
        write_report(folder)
