"""Mutants of a toy checkout: what is planted, what is no mutant, and that a test which fails catches one."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from benchmarks import mutants

CODE = """\
def larger(a: int | None, b: int) -> int:
    \"\"\"Doc.\"\"\"
    if a is None:
        return b
    print(a, "and", b)
    return sum([max(a, b)], b - b)
"""
TEST = """\
from toy import larger


def test_larger():
    assert larger(None, 2) == 2
    assert larger(1, 2) == 2
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy.py").write_text(CODE)
    (tmp_path / "test_toy.py").write_text(TEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "TESTS", {"toy.py": "test_toy.py"})
    return tmp_path


def test_every_module_and_its_tests_exist() -> None:
    for module, tests in mutants.TESTS.items():
        paths = (word for word in shlex.split(tests) if word.startswith("tests/"))
        for path in (module, *paths):
            assert (mutants.ROOT / path).exists(), path


def test_statements_are_left_out_and_arguments_swapped() -> None:
    left_out = list(mutants.omissions(CODE))
    assert left_out == [
        CODE.replace("    if a is None:\n        return b\n", "    pass\n"),
        CODE.replace('    print(a, "and", b)\n', "    pass\n"),
    ]
    assert list(mutants.swaps(CODE)) == [
        CODE.replace('print(a, "and", b)', 'print("and", a, b)'),
        CODE.replace('print(a, "and", b)', 'print(a, b, "and")'),
        CODE.replace("sum([max(a, b)], b - b)", "sum(b - b, [max(a, b)])"),  # and not those of max
    ]
    assert list(mutants.swaps("f(é, (b,\n  c))\n")) == ["f((b,\n  c), é)\n"]


def test_a_change_of_an_annotation_is_no_mutant(checkout: Path) -> None:
    planted = [mutants.plant("toy.py", *place) for place in mutants.places("toy.py")]
    assert None in planted, "the | in an annotation"
    assert all(mutant is None or not mutant.before.startswith("def") for mutant in planted)
    assert any(mutant and mutant.before == "if a is None:" for mutant in planted)


def test_what_cannot_be_planted_is_left_out(checkout: Path) -> None:
    (checkout / "toy.py").write_text("import os\ntry:\n    pass\nexcept (os.error, ValueError):\n    pass\n")
    planted = [mutants.plant("toy.py", "core/ExceptionReplacer", occurrence) for occurrence in range(2)]
    assert None in planted


def test_a_mutant_is_caught_by_a_test_that_fails_and_tried_again_when_it_was_not(checkout: Path) -> None:
    out = checkout / "mutants.json"
    assert mutants.main(["--sample", "3", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 3
    for row in rows:
        harmless = "print" in row["before"]
        assert row["outcome"] == ("survived" if harmless else "caught"), row
    (checkout / "test_toy.py").write_text(TEST + "    assert False\n")
    with pytest.raises(SystemExit, match="does not pass without a fault"):
        mutants.main(["--sample", "9", "--out", str(out)])
