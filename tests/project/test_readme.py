"""The documents are true: their commands run, links and names exist, figures are those of results."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.readme_tables import DOCUMENTS, fill
from tests.waiting import DEADLINE, eventually

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines() if line.strip()]
PYTHON = ".venv/bin/python "
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/*.md")]

# The README's commands are given at full size; these make the same path short enough for a test.
SMALL = {
    "-m training data shop": "--users 60 --items 30",
    "-m training run": "--config small.yaml",
    "-m training evaluate": "--beam 5 --users 20",
}
SMALL_CONFIG = """
tokenizer: {rqvae: {levels: 2, codes: 8, latent: 8, hidden: 16, steps: 20, warmup_steps: 5}}
model: {d_model: 16, d_kv: 8, d_ff: 32, layers: 1, heads: 2, max_items: 5, reasoning_codes: 8}
pretrain: {steps: 4, batch_size: 16, eval_every: 0}
sft: {steps: 4, batch_size: 16, eval_every: 0}
rl: {steps: 2, batch_size: 4, group: 2, eval_every: 0}
evaluation: {beam: 5, valid_users: 20, choice_users: 20}
"""


def commands(start: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(start)]


def test_every_kind_of_command_is_tested() -> None:
    # The helm command is tested with the chart, in tests/helm.
    tested = ("make ", "curl ", "docker build ", "helm install ", PYTHON + "-m training ", PYTHON + "-m app serve ")
    assert [command for command in COMMANDS if not command.startswith(tested)] == []
    assert all(commands(start) for start in tested)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(arguments: list[str], folder: Path) -> Iterator[str]:
    """Runs the service until it is ready; yields its address. It has to end by itself on SIGTERM."""
    port = free_port()
    log = folder / f"service-{port}.log"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments, "--port", str(port)], cwd=folder, env=environment, stdout=out, stderr=out
        )
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=DEADLINE):
                    return True
            except OSError:
                return False

        eventually(ready)
        yield f"127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    bundle = str(ROOT / "bundles" / "demo")
    with serving(["-m", "app", "serve", "--bundle", bundle], tmp_path_factory.mktemp("demo")) as address:
        yield address


def test_from_data_to_an_answer(tmp_path: Path) -> None:
    """The commands of "Train" and "Serve", in their order, in an empty folder."""
    (tmp_path / "small.yaml").write_text(SMALL_CONFIG)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in commands(PYTHON):
        arguments = shlex.split(command.removeprefix(PYTHON))
        if arguments[:3] == ["-m", "app", "serve"]:
            with serving(arguments, tmp_path) as address:
                answer = ask(address, {"history": [], "k": 2})
                assert len(answer["items"]) == 2
            continue
        for start, more in SMALL.items():
            if command.startswith(PYTHON + start):
                arguments += more.split()
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def ask(address: str, body: dict[str, object]) -> dict[str, list[object]]:
    request = urllib.request.Request(
        f"http://{address}/recommend", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=DEADLINE) as response:
        return json.load(response)


@pytest.mark.parametrize("command", commands("curl "))
def test_curl_gets_an_answer(command: str, demo: str) -> None:
    sent = shlex.split(command.replace("127.0.0.1:8000", demo))
    done = subprocess.run([*sent, "--fail-with-body"], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(json.loads(done.stdout)["items"]) == 3


def test_routes_exist(demo: str) -> None:
    """Each `METHOD /path` of the README's table is a route of the service."""
    with urllib.request.urlopen(f"http://{demo}/openapi.json", timeout=DEADLINE) as response:
        described = {
            (method.upper(), re.sub(r"\{\w+\}", "{}", path))
            for path, methods in json.load(response)["paths"].items()
            for method in methods
        }
    named = []
    for cell in re.findall(r"^\| (`(?:GET|POST|PUT|DELETE).*?) \|", README, re.MULTILINE):
        methods: list[str] = []
        for part in re.findall(r"`([^`]+)`", cell):
            *names, path = part.split()
            methods += names
            if path.startswith("/"):
                named += [(method, re.sub(r"\{\w+\}", "{}", path.split("?")[0])) for method in methods]
                methods = []
            else:
                methods.append(path)
    assert len(named) > 8
    for method, path in named:
        if (method, path) in described:
            continue
        assert method == "GET", f"the README names {method} {path}, which does not exist"
        with urllib.request.urlopen(f"http://{demo}{path}", timeout=DEADLINE) as response:
            assert response.status == 200


@pytest.mark.parametrize("command", commands("make "))
def test_make_targets_exist(command: str) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", commands("docker build "))
def test_docker_builds_what_exists(command: str) -> None:
    context = shlex.split(command)[-1]
    assert (ROOT / context / "Dockerfile").exists()


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", sorted({*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in PAGES)}))
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in headings(path), f"{document} links to {target}#{anchor}"


@pytest.mark.parametrize("document", sorted({*DOCUMENTS, *(str(path.relative_to(ROOT)) for path in PAGES)}))
def test_files_and_modules_that_a_document_names_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    text = re.sub(r"<sub>.*?</sub>", "", text)  # the commands of records, as they were called at their commit
    for path in re.findall(r"`((?:app|benchmarks|docs|helm|requirements|serving|tests|training)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{document} names {path}"
    for module in re.findall(r"-m ((?:app|benchmarks|serving|training)[\w.]*)", text):
        assert importlib.util.find_spec(module), f"{document} names the module {module}"


@pytest.mark.parametrize(("document", "lines"), [("README.md", 150), ("docs/RESULTS.md", 130)])
def test_the_first_documents_stay_short(document: str, lines: int) -> None:
    assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= lines


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_what_the_results_say(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert fill(text) == text, "run `python -m benchmarks.readme_tables`"


def write_result(path: Path, rows: list[dict[str, object]]) -> None:
    machine = {"cpu": "some CPU", "gpu": None, "threads": 1, "torch": "2.13.0"}
    run = {"command": "python -m x", "commit": "0123456789abcdef", "seeds": [0], "machine": machine, "rows": rows}
    path.write_text(json.dumps(run | {"data": path.stem}))


def test_a_table_is_filled_from_its_result(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"model": "popularity", "ndcg@10": 0.0162, "hidden": 1},
        {"model": "neighbours", "ndcg@10": 0.0783},
    ]
    write_result(tmp_path / "small.json", rows)
    text = "before\n<!-- table:small model ndcg@10 -->\nold\n<!-- /table -->\nafter\n"
    filled = fill(text, tmp_path)
    assert "0.0783" in filled
    assert "`012345678`" in filled
    assert "old" not in filled
    assert "hidden" not in filled
    assert fill(filled, tmp_path) == filled
    with pytest.raises(SystemExit, match="column 'recall'"):
        fill(text.replace("ndcg@10", "recall"), tmp_path)
    with pytest.raises(SystemExit, match=r"other\.json, which does not exist"):
        fill(text.replace("table:small", "table:other"), tmp_path)


def test_a_table_joins_files_selects_rows_and_renames_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"model": name, "ndcg@10": 0.5} for name in ("l = 4, 4 steps", "pause", "plain")]
    for name in ("a", "b"):
        write_result(tmp_path / f"{name}.json", rows)
    text = '<!-- table:a+b data model:the_model ndcg@10 model="l = 4, 4 steps|pause" -->\n<!-- /table -->\n'
    lines = [[cell.strip() for cell in line.split("|")[1:3]] for line in fill(text, tmp_path).splitlines()[1:7]]
    assert lines[0] == ["data", "the model"]
    assert lines[2:] == [["a", "l = 4, 4 steps"], ["a", "pause"], ["b", "l = 4, 4 steps"], ["b", "pause"]]


def test_a_value_in_running_text_is_that_of_the_one_row_that_fits(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"server": "ours", "per_s": 1342.46}, {"server": "theirs", "per_s": 26}]
    write_result(tmp_path / "servers.json", rows)
    text = "<!-- value:servers per_s server=ours digits=0 -->?<!-- /value --> a second"
    assert fill(text, tmp_path) == text.replace("?", "1,342")
    with pytest.raises(SystemExit, match="2 rows of servers fit"):
        fill(text.replace(" server=ours", ""), tmp_path)


def test_the_detectable_difference_is_2_8_standard_errors(tmp_path: Path) -> None:
    """An interval of 0.01 +- 1.96 standard errors of 0.001, against a row of 0.1: 2.8 of them are 2.8%."""
    rows: list[dict[str, object]] = [{"ndcg@10": 0.11, "gain": 0.01, "low": 0.01 - 0.00196, "high": 0.01 + 0.00196}]
    write_result(tmp_path / "a.json", rows)
    expected = [
        ("detectable", "2.8"), ("low_percent", "8.0"), ("high_percent", "12.0"), ("interval", "8.0 to 12.0"),
        ("detectable_gain", "0.0028"),
    ]  # fmt: skip
    for column, value in expected:
        assert f">{value}<" in fill(f"<!-- value:a {column} -->?<!-- /value -->", tmp_path)
    write_result(tmp_path / "b.json", [{"ndcg@10": 0.01, "gain": 0.01, "low": 0.008, "high": 0.012}])  # of nothing
    assert ">0.0029<" in fill("<!-- value:b detectable_gain -->?<!-- /value -->", tmp_path)
