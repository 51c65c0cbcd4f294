"""The tool that plants mistakes: every one is real code, in its place, taken out again, and the table explains who survived."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tools import mutate

SOURCE = '''"Words."
# %% ../nbs/module/01_room.ipynb #aaaa
import os
if TYPE_CHECKING:
    from x import Y
__all__ = ['f']
# %% ../nbs/module/01_room.ipynb #bbbb
def f(a: int = 3, é: "1 + 1" = 0.5) -> 0 + 0:  # 1 < 2
    "1 + 1"
    if a < 2 and é:  # é stands before what is changed
        raise ValueError(f"{a + 1}")
    x[a] = 1
    for k in a[1:]:
        break
    a += 1
    print(not a, -a)
    return min(a, b) if a else g(a, k=1)
# %% ../nbs/module/01_room.ipynb #cccc
done = True
'''


def found(source: str = SOURCE) -> dict[str, set[str]]:
    "Operator → the changes that it makes."
    table: dict[str, set[str]] = {}
    for mutant, _ in mutate.mutants("room", source):
        table.setdefault(mutant.operator, set()).add(mutant.change)
    return table


def test_every_kind_of_mistake_is_made() -> None:
    table = found()
    assert table["comparison"] == {"a < 2 → (a <= 2)"} and table["and, or"] == {"a < 2 and é → (a < 2 or é)"}
    assert table["condition dropped"] == {"a < 2 and é → (a < 2)", "a < 2 and é → (é)"}
    assert table["condition negated"] == {"a < 2 and é → not (a < 2 and é)"} and table["arithmetic"] == {"a += 1 → a -= 1"}
    assert {"3 → (4)", "3 → (2)", "0.5 → 1.0", "0.5 → 0.25", "True → False"} <= table["constant"]
    assert table["not or minus dropped"] == {"not a → (a)", "-a → (a)"} and table["break, continue"] == {"break → continue"}
    assert table["statement left out"] == {'raise ValueError(f"{a + 1}") → pass', "x[a] = 1 → pass", "print(not a, -a) → pass"}
    assert table["slice"] == {"1: → :"} and table["other function"] == {"min(a, b) → (max(a, b))"} and table["argument dropped"] == {"g(a, k=1) → (g(a))"}
    assert table["branches swapped"] == {"min(a, b) if a else g(a, k=1) → (g(a, k=1) if a else min(a, b))"}
    assert table["returns None"] == {"return min(a, b) if a else g(a, k=1) → return None"}


def test_the_same_change_twice_in_a_line_is_two_mistakes() -> None:
    assert found("x = f(1, 1)\n")["constant"] == {"1 → (2)", "1 → (0)", "1 → (2) [2]", "1 → (0) [2]"}


def test_nothing_is_changed_where_it_does_not_matter() -> None:
    changed = [text for _, text in mutate.mutants("room", SOURCE)]
    for kept in ('"1 + 1" = ', "-> 0 + 0:  # 1 < 2", "if TYPE_CHECKING:", "__all__ = ['f']"):
        assert all(kept in text for text in changed), kept
    assert all('f"{a + 1}"' in text or "\n        pass\n" in text for text in changed)


def test_every_mistake_of_the_package_is_code_of_its_own() -> None:
    for path in sorted((mutate.ROOT / "tl_tutorial").glob("[!_]*.py")):
        source = path.read_text()
        for mutant, changed in mutate.mutants(path.stem, source)[::21]:
            assert changed != source and compile(changed, path.name, "exec"), mutant
            assert source.split("\n")[mutant.line - 1].strip() == mutant.source


def test_the_choice_is_even_and_can_be_made_again() -> None:
    rooms = {path.stem: path.read_text() for path in sorted((mutate.ROOT / "tl_tutorial").glob("[!_]*.py"))[::4]}
    one, two, other, few = ([mutant.key for mutant, _ in mutate.chosen(rooms, count, seed)]
                            for count, seed in ((3 * len(rooms), 0), (3 * len(rooms), 0), (3 * len(rooms), 1), (5, 0)))
    assert one == two != other and one[:5] == few and len(set(one)) == 3 * len(rooms)
    assert set(Counter(key[0] for key in one).values()) == {3} and len({key[2] for key in one}) >= 8, "many kinds of mistakes"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    (tmp_path / "copy/tl_tutorial").mkdir(parents=True)
    (tmp_path / "copy/nbs/module").mkdir(parents=True)
    (tmp_path / "copy/tests").mkdir()
    (tmp_path / "copy/tl_tutorial/room.py").write_text(SOURCE)
    cells = [{"id": name, "cell_type": "code", "source": ["#| export\n", f"the old {name}\n"]} for name in ("aaaa", "bbbb", "cccc")]
    (tmp_path / "copy/nbs/module/01_room.ipynb").write_text(json.dumps({"cells": cells}))
    return tmp_path / "copy"


def test_a_mistake_is_planted_in_module_and_notebook_and_taken_out_again(copy: Path) -> None:
    module, notebook = copy / "tl_tutorial/room.py", copy / "nbs/module/01_room.ipynb"
    before = module.read_text(), notebook.read_text()
    mutant, changed = next(m for m in mutate.mutants("room", SOURCE) if m[0].operator == "comparison")
    with pytest.raises(KeyboardInterrupt), mutate.planted(mutant, changed, copy):
        assert module.read_text() == changed
        cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"]]
        assert cells[0] == "#| export\nthe old aaaa\n" and cells[2] == "#| export\nthe old cccc\n"
        assert cells[1].startswith("#| export\ndef f(") and "if (a <= 2) and é:" in cells[1]
        raise KeyboardInterrupt
    assert (module.read_text(), notebook.read_text()) == before


def test_the_quick_tests_come_first() -> None:
    assert mutate.tests_of("metrics", mutate.ROOT) == ["tests/test_units_result.py", "nbs/module/12_metrics.ipynb", "tests/test_oracles.py"]
    named = {name for text in [*mutate.CONCERNED.values(), mutate.OTHERWISE] for name in text.split()}
    assert all((mutate.ROOT / "tests" / (name if "/" in name else f"test_{name}")).with_suffix(".py").exists() for name in named)


def test_what_was_written_by_hand_survives_the_table(tmp_path: Path) -> None:
    one = mutate.Mutant("room", 3, "if a < 2:", "comparison", "a < 2 → (a <= 2)", "survived", "", 1.5, 'never "both"\tequal')
    mutate.write_results(tmp_path / "t.tsv", [one])
    assert mutate.read_results(tmp_path / "t.tsv") == [one] and mutate.read_results(tmp_path / "none.tsv") == []


def test_every_survivor_of_the_table_is_explained() -> None:
    results = mutate.read_results(mutate.RESULTS)
    assert {m.outcome for m in results} <= {"killed", "timeout", "survived"} and len({m.key for m in results}) == len(results)
    assert [m.key for m in results if m.outcome == "survived" and not m.why] == []
    assert all(m.by for m in results if m.outcome == "killed") and len({m.room for m in results}) >= 20
