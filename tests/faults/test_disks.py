"""A disk that really is full: training and scoring stop in one sentence, and go on once there is room."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults.conftest import SmallDisk
from tests.training.shops import command, write_shop

ROOT = Path(__file__).parents[2]
COUNT = "import pyarrow.parquet as pq, sys; print(*pq.read_table(sys.argv[1])['user_id'].to_pylist())"


def python(*words: object) -> list[str]:
    return ["env", "-C", str(ROOT), "OMP_NUM_THREADS=1", sys.executable, *map(str, words)]


def test_a_full_disk_under_the_scores_keeps_the_parts_that_were_written(bundle, tmp_path, small_disk: SmallDisk):
    rng = np.random.default_rng(0)
    users = [f"u{n}" for n in range(600)]
    histories = [[f"i{row}" for row in rng.integers(0, 60, 6)] for _ in users]
    pq.write_table(pa.table({"user_id": users, "history": histories}), tmp_path / "h.parquet")
    out = small_disk.folder / "out.parquet"
    score = python("-m", "serving", "score", "--bundle", bundle, "--histories", tmp_path / "h.parquet",
                   "--out", out, "--part-users", 50, "--beam", 10)  # fmt: skip
    parts = ["find", f"{out}.parts", "-name", "part-*"]
    stopped, left, again, who = small_disk.run("64k", score, parts, "8m", score, python("-c", COUNT, out))
    assert stopped.returncode == 2
    (sentence,) = [line for line in stopped.stderr.splitlines() if line.startswith("streamrec: ")]
    assert "is full; free some space" in sentence and "Traceback" not in stopped.stderr
    written = left.stdout.splitlines()
    assert 0 < len(written) < 12 and all(name.endswith(".parquet") for name in written)  # no half a file
    assert again.returncode == 0, again.stderr
    assert f"{50 * len(written)} of 600 users are already scored" in again.stderr
    assert who.stdout.split() == users  # nobody lost, nobody doubled


def test_a_full_disk_under_a_checkpoint_stops_training_and_it_goes_on_once_there_is_room(tmp_path, small_disk):
    data = write_shop(tmp_path / "shop")
    out = small_disk.folder / "b"
    train = python("-m", "training", *command("run", data, out))
    # Room enough for the bytes, or the run would be refused at once: it is the number of files that runs out.
    left = ["ls", f"{out}.work"]
    stopped, kept, again, files = small_disk.run(
        "20m,nr_inodes=14", train, left, "20m,nr_inodes=1k", train, ["ls", str(out)]
    )
    assert stopped.returncode == 2
    (sentence,) = [line for line in stopped.stderr.splitlines() if line.startswith("streamrec: ")]
    assert "is full; free some space" in sentence
    assert "pretrain.latest.safetensors" in kept.stdout and "rl.latest.safetensors" not in kept.stdout
    assert again.returncode == 0, again.stderr
    assert {"bundle.json", "catalogue.parquet", "heads.safetensors", "model"} <= set(files.stdout.split())
