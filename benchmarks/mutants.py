"""Plants small faults into the code, one at a time, and counts those that the tests catch (`make mutants`).

cosmic-ray changes an operator, a comparison, a number, a boolean, a loop or a decorator. Two kinds are ours, because
faults planted by hand are often of them: a statement is left out, two arguments change places. A mutant is run with
the tests of its module (TESTS), in a copy of the checkout, and is caught when a test fails or they do not end in time.
Changes of what does not change behaviour are no mutants: annotations, the `strict` of a zip, the order in a maximum.

The result is written after every mutant. The same command continues where it was stopped, and tries again what was not
caught. docs/MUTANTS.md explains what survived.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from benchmarks.common import ROOT, Run, argument_parser, result_file

# A module, and the tests that have to catch its faults: few seconds each, since every mutant runs them. So trainings of
# many steps, processes that are killed and a second runtime are left out, as pytest's -k says it.
SEARCH = "tests/serving/search/test_decoder.py tests/serving/search/test_ranker.py"
SEARCH += " tests/serving/search/test_beam.py -k 'not onnx'"
STAGES = (
    "tests/training/stages/test_formulas.py tests/training/stages/test_losses.py tests/training/stages/test_stages.py"
)
SHORT = "-k 'not falls and not learns and not literal and not rise and not likelihood_of_the_target and not trained'"
REWARDS = f"tests/training/stages/test_rewards.py {STAGES} {SHORT}"
SCORE = "tests/serving/offline -k 'not ray and not kill and not memory'"
TESTS = {
    "serving/bundle.py": "tests/serving/test_bundle.py",
    "serving/bundle_writer.py": "tests/serving/test_bundle.py",
    "serving/files.py": "tests/serving/test_files.py tests/serving/test_bundle.py",
    "serving/items/ancestry.py": "tests/serving/items",
    "serving/items/blocked.py": "tests/serving/items/test_rules.py",
    "serving/items/catalogue.py": "tests/serving/items/test_catalogue.py tests/serving/items/test_rules.py",
    "serving/items/histories.py": "tests/serving/search/test_beam.py",
    "serving/items/nearest.py": "tests/serving/items/test_nearest.py",
    "serving/items/neighbours.py": "tests/serving/items/test_neighbours.py",
    "serving/items/order.py": "tests/serving/items",
    "serving/items/prepared_sets.py": "tests/serving/items/test_rules.py",
    "serving/items/table_masks.py": "tests/serving/items/test_rules.py",
    "serving/items/rules.py": "tests/serving/items/test_rules.py",
    "serving/items/tokenizer.py": "tests/serving/items/test_tokenizer.py -k 'not importing and not unreachable'",
    "serving/items/trie.py": "tests/serving/items/test_trie.py",
    "serving/items/trie_file.py": "tests/serving/items/test_trie_file.py",
    "serving/items/vocabulary.py": "tests/serving/items/test_trie.py tests/serving/search/test_beam.py",
    "serving/manifest.py": "tests/serving/test_bundle.py",
    "serving/network/eager.py": SEARCH,
    "serving/network/model.py": f"tests/serving/network/test_model.py tests/training/stages/test_packed.py {SEARCH}",
    "serving/network/onnx.py": "tests/serving/network/test_onnx.py",
    "serving/network/onnx_graph.py": "tests/serving/network/test_onnx.py",
    "serving/network/t5.py": f"tests/serving/network/test_t5.py tests/training/stages/test_packed.py {SEARCH}",
    "serving/offline/input.py": SCORE,
    "serving/offline/score.py": SCORE,
    "serving/offline/scorer.py": SCORE,
    "serving/online/admission.py": "tests/serving/online/test_admission.py",
    "serving/online/batcher.py": "tests/serving/online/test_batcher.py",
    "serving/online/cache.py": "tests/serving/online/test_cache.py",
    "serving/online/costs.py": "tests/serving/online/test_costs.py",
    "serving/online/recommender.py": "tests/app/test_recommend.py tests/app/test_users_items.py",
    "serving/online/query.py": "tests/app/test_recommend.py tests/app/test_users_items.py",
    "serving/online/listing.py": "tests/app/test_recommend.py tests/app/test_pages.py tests/app/test_rotation.py",
    "serving/online/redis_link.py": "tests/serving/online/test_redis_link.py tests/serving/online/test_cache.py",
    "serving/online/tiers.py": "tests/serving/online/test_tiers.py tests/serving/online/test_cache.py",
    "serving/online/users.py": "tests/serving/online/test_users.py",
    "serving/online/watchdog.py": "tests/serving/online/test_watchdog.py",
    "serving/search/beam.py": SEARCH,
    "serving/search/candidates.py": SEARCH,
    "serving/search/cuda_graph.py": "tests/serving/search/test_cuda_graph.py tests/serving/search/test_static.py",
    "serving/search/decoder.py": SEARCH,
    "serving/search/memory.py": SEARCH,
    "serving/search/ranker.py": "tests/serving/search/test_ranker.py",
    "training/evaluate.py": "tests/training/test_evaluate.py",
    "training/metrics.py": "tests/training/test_metrics.py",
    "training/refit.py": "tests/training/test_refit.py",
    "training/stages/begin.py": "tests/training/stages/test_begin.py",
    "training/stages/diagnostics.py": "tests/training/test_evaluate.py",
    "training/stages/distributed.py": "tests/training/stages/test_distributed.py -k 'not resuming and not error'",
    "training/stages/losses.py": "tests/training/stages/test_losses.py",
    "training/stages/loop.py": "tests/training/stages/test_resume.py -k 'not kill and not repeatedly'",
    "training/stages/predictions.py": "tests/training/stages/test_losses.py tests/training/stages/test_formulas.py",
    "training/stages/pretrain.py": f"{STAGES} {SHORT}",
    "training/stages/reasoning.py": "tests/training/stages/test_reasoning.py tests/training/stages/test_formulas.py",
    "training/stages/rewards.py": REWARDS,
    "training/stages/rl.py": f"{STAGES} {SHORT}",
    "training/stages/rollouts.py": REWARDS,
    "training/stages/sft.py": f"{STAGES} {SHORT}",
}
OUR_PACKAGES = ("app", "benchmarks", "serving", "tests", "training")
PATIENCE = 5  # a mutant may take this many times what the tests take without it
SYMMETRIC = {"array_equal", "equal", "max", "maximum", "min", "minimum", "not_equal"}  # a swap changes nothing


@dataclass(frozen=True, slots=True)
class Mutant:
    """A module's code with one fault in it. before, after: the lines that differ."""

    module: str
    code: str
    before: str
    after: str


def places(module: str) -> list[tuple[str, int]]:
    """Where something can be planted: (kind or operator, occurrence). Of several operators at a position one is kept,
    or a single `+`, for which there are eleven, would be most of a sample."""
    found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast_from_path(ROOT / module)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments():
            continue
        positions = (where for node in nodes for where in kind().mutation_positions(node))
        for occurrence, where in enumerate(positions):
            found.setdefault(where, []).append((name, occurrence))
    code = (ROOT / module).read_text(encoding="utf-8")
    for own, edits in (("omit", omissions(code)), ("swap", swaps(code))):
        for occurrence, _ in enumerate(edits):
            found[own, occurrence] = [(own, occurrence)]
    choose = random.Random(module)
    return [choose.choice(operators) for operators in found.values()]


def plant(module: str, name: str, occurrence: int) -> Mutant | None:
    """The mutant; None where it is no Python or behaves the same."""
    code = (ROOT / module).read_text(encoding="utf-8")
    if name in ("omit", "swap"):
        changed: str | None = list(omissions(code) if name == "omit" else swaps(code))[occurrence]
    else:
        try:
            changed = mutate_code(code, get_operator(name)(), occurrence)
        except AttributeError:  # cosmic-ray cannot replace an exception that is named with its module
            return None
    try:
        if changed is None or behaviour(changed) == behaviour(code):
            return None
    except SyntaxError:
        return None
    lines = list(difflib.unified_diff(code.splitlines(), changed.splitlines(), n=0, lineterm=""))[3:]
    before, after = ("\n".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return Mutant(module, changed, before, after)


def behaviour(code: str) -> str:
    """The code without annotations, which nothing evaluates, docstrings, and whether a zip is strict: a check that
    holds wherever the code is right."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
        elif isinstance(node, ast.keyword) and node.arg == "strict":
            node.value = ast.Constant(0)
    return ast.dump(tree)


def omissions(code: str) -> Iterator[str]:
    """The code without one call, assignment to something that exists, or guard (an `if` that only ends something)."""
    lines = code.splitlines(keepends=True)
    for node in ast.walk(ast.parse(code)):
        is_call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
        is_change = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
        is_guard = (
            isinstance(node, ast.If)
            and not node.orelse
            and isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue | ast.Break)
        )
        if (is_call or is_change or is_guard or isinstance(node, ast.AugAssign)) and isinstance(node, ast.stmt):
            if not lines[node.lineno - 1][: node.col_offset].strip():
                indented = " " * node.col_offset + "pass\n"
                yield "".join([*lines[: node.lineno - 1], indented, *lines[node.end_lineno :]])


def swaps(code: str) -> Iterator[str]:
    """The code with two neighbouring arguments of one call in each other's place."""
    starts = [0]
    for line in code.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] not in SYMMETRIC:
            for first, second in zip(node.args, node.args[1:], strict=False):
                if isinstance(first, ast.Starred) or isinstance(second, ast.Starred):
                    continue
                spans = []
                for part in (first, second):
                    assert part.end_lineno is not None and part.end_col_offset is not None
                    begin = starts[part.lineno - 1] + part.col_offset
                    spans.append(slice(begin, starts[part.end_lineno - 1] + part.end_col_offset))
                text = code.encode()
                a, b = (text[span] for span in spans)
                between = text[spans[0].stop : spans[1].start]
                yield (text[: spans[0].start] + b + between + a + text[spans[1].stop :]).decode()


class Copy:
    """A copy of the checkout in which tests run, each time in a process of its own that has the libraries loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._usual: dict[str, float] = {}

    def seconds(self, tests: str) -> float:
        """What the tests take without a fault. Raises SystemExit if they fail then."""
        if tests not in self._usual:
            began = time.monotonic()
            if self.passes(tests, None) is not True:
                raise SystemExit(f"{tests} does not pass without a fault: mend that first.")
            self._usual[tests] = time.monotonic() - began
        return self._usual[tests]

    def try_out(self, mutant: Mutant, tests: str) -> str:
        """caught, timed out (caught as well) or survived."""
        limit = PATIENCE * self.seconds(tests)
        path = self.folder / mutant.module
        original = path.read_text(encoding="utf-8")
        try:
            self._write(path, mutant.code)
            passed = self.passes(tests, limit)
        finally:
            self._write(path, original)
        return {True: "survived", False: "caught", None: "timed out"}[passed]

    @staticmethod
    def _write(path: Path, code: str) -> None:
        path.write_text(code, encoding="utf-8")
        # Bytecode is known by time and size, and a mutant may have both of the code before it.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def passes(self, tests: str, limit: float | None) -> bool | None:
        """Whether the tests pass; None if they have not ended after `limit` seconds."""
        process = multiprocessing.get_context("fork").Process(target=self._run, args=(tests,))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            return None
        return process.exitcode == 0

    def _run(self, tests: str) -> None:
        os.chdir(self.folder)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        for name in [name for name in sys.modules if name.split(".")[0] in OUR_PACKAGES]:
            del sys.modules[name]  # of the real checkout
        sys.path[:] = [str(self.folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        # The first example that fails is enough: a smaller one would be looked for many times as long.
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
        options = "-x -q --hypothesis-profile=mutants -p no:cacheprovider -p no:randomly"
        code = pytest.main([*options.split(), *shlex.split(tests)])
        os._exit(int(code))


def known(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What an earlier run has found, by mutant."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {(row["module"], row["before"], row["after"]): row for row in rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argument_parser("benchmarks.mutants", __doc__)
    parser.add_argument("--sample", type=int, default=200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--modules", help="only modules whose path holds one of these words, separated by commas")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/mutants.json")
    options = parser.parse_args(arguments)
    run, earlier = Run(parser, options), known(options.out)
    rows: list[dict[str, Any]] = []
    words = (options.modules or "").split(",")
    modules = [module for module in TESTS if any(word in module for word in words) and (ROOT / module).exists()]
    everywhere = [(module, *place) for module in modules for place in places(module)]
    random.Random(options.seed).shuffle(everywhere)
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for module, name, occurrence in everywhere:
            if len(rows) == options.sample:
                break
            if (mutant := plant(module, name, occurrence)) is None:
                continue
            row = earlier.pop((module, mutant.before, mutant.after), None)
            if row is None or row["outcome"] == "survived":
                outcome = copy.try_out(mutant, TESTS[module])
                row = {"module": module, "before": mutant.before, "after": mutant.after, "outcome": outcome}
                if outcome == "survived":
                    print(f"\n{module} survived\n- {mutant.before}\n+ {mutant.after}", flush=True)
            rows.append(row)
            # What an earlier run knows and this one has not come to yet is kept, should this one be stopped.
            run.record(options.out, [options.seed], [*rows, *earlier.values()], places=len(everywhere))
            caught = sum(row["outcome"] != "survived" for row in rows)
            print(f"\r{caught} of {len(rows)} caught", end="", flush=True)
    run.record(options.out, [options.seed], rows, places=len(everywhere))
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
