"""What one would build today: transformers' `generate` over a bundle, behind FastAPI or behind LitServe.

    python -m benchmarks.service.generate_servers fastapi --bundle bundles/demo --port 8001
    python -m benchmarks.service.generate_servers litserve --bundle bundles/demo --port 8001

Both take POST /recommend {"history", "k"} and answer {"items": [{"item_id", "score"}]}, best first: a beam of 50
without reasoning, restricted to the catalogue by a function of prefixes over a dict of them. FastAPI answers
one request at a time in its thread pool; LitServe batches waiting requests. Neither uses code of this project: a bundle
can be opened without it.
"""

# No `from __future__ import annotations`: LitServe derives schemas from the annotations here.

import argparse
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
import pyarrow.parquet as pq
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    T5ForConditionalGeneration,
)

BEAMS = 50
BATCH, BATCH_TIMEOUT = 16, 0.005  # seconds; the service's own largest batch

Items = list[dict[str, Any]]


class PerBlock(LogitsProcessor):
    """Log-probabilities among a level's codes, from those among the whole vocabulary. blocks: the codes by level."""

    def __init__(self, blocks: list[slice]) -> None:
        self.blocks = blocks

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        block = self.blocks[input_ids.shape[1] - 1]
        return scores - scores[:, block].logsumexp(1, keepdim=True)


class Generator:
    """A bundle's model run by transformers alone: a key-value cache, no gradients, torch's number of threads."""

    def __init__(self, bundle: Path) -> None:
        manifest = json.loads((bundle / "bundle.json").read_text())
        if (
            manifest["score"]["temperature"] != 1
            or manifest["encoder"]["attention"] != "bidirectional"
            or manifest["encoder"].get("age_bias")
        ):
            raise SystemExit(
                "This bundle needs a temperature or an encoder attention that transformers' generate lacks."
            )
        self.model = T5ForConditionalGeneration.from_pretrained(bundle / "model").train(False)
        self.length: int = manifest["tokens_per_item"]
        self.max_items, self.suffix = manifest["history"]["max_items"], manifest["history"]["suffix_tokens"]
        self.pad, self.start = manifest["vocabulary"]["pad"], manifest["reasoning"]["start_tokens"][0]
        rows = pq.read_table(bundle / "catalogue.parquet", columns=["item_id", "tokens"]).to_pylist()
        self.tokens = {row["item_id"]: row["tokens"] for row in rows}
        self.items = {tuple(row["tokens"]): row["item_id"] for row in rows}
        followers: dict[tuple[int, ...], set[int]] = {}
        for path in self.items:
            for level, token in enumerate(path):
                followers.setdefault(path[:level], set()).add(token)
        self.followers = {prefix: sorted(tokens) for prefix, tokens in followers.items()}
        self.processors = LogitsProcessorList([PrefixConstrainedLogitsProcessor(self._allowed, BEAMS)])
        if manifest["score"].get("normalise") == "block":
            vocabulary = manifest["vocabulary"]
            sizes = zip(vocabulary["level_offsets"], vocabulary["codebook_sizes"], strict=True)
            self.processors.insert(0, PerBlock([slice(first, first + size) for first, size in sizes]))

    def _allowed(self, _: int, decoded: torch.Tensor) -> list[int]:
        return self.followers[tuple(decoded.tolist()[1:])]

    @torch.inference_mode()
    def recommend(self, histories: Sequence[Sequence[str]], k: int) -> list[Items]:
        """The best k items for each of B histories."""
        inputs = [
            [token for item in history[-self.max_items :] for token in self.tokens[item]] + self.suffix
            for history in histories
        ]
        longest = max(map(len, inputs))
        output = self.model.generate(
            torch.tensor([row + [self.pad] * (longest - len(row)) for row in inputs]),
            attention_mask=torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in inputs]),
            decoder_start_token_id=self.start,
            max_new_tokens=self.length,
            num_beams=BEAMS,
            num_return_sequences=k,
            do_sample=False,
            length_penalty=0.0,  # the score is the sum of log-probabilities
            eos_token_id=None,
            pad_token_id=self.pad,
            use_cache=True,
            logits_processor=self.processors,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = [
            {"item_id": self.items[tuple(path[1:])], "score": score}
            for path, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True)
        ]
        return [found[first : first + k] for first in range(0, len(found), k)]


class Body(BaseModel):
    history: list[str]
    k: int = 10


class Recommended(BaseModel):
    items: list[dict[str, Any]]


def fastapi_app(generator: Generator) -> FastAPI:
    app, one_at_a_time = FastAPI(), threading.Lock()

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    @app.post("/recommend")
    def recommend(body: Body) -> Recommended:
        with one_at_a_time:  # threads that compute at the same time only slow each other down
            return Recommended(items=generator.recommend([body.history], body.k)[0])

    return app


class Batched(litserve.LitAPI):  # type: ignore[misc]
    """LitServe calls these methods in a process of its own, with the bodies of a batch."""

    def __init__(self, bundle: Path, **options: Any) -> None:
        super().__init__(**options)
        self.bundle = bundle

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        self.generator = Generator(self.bundle)

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, batch: list[dict[str, Any]]) -> list[Items]:
        k = [body.get("k", 10) for body in batch]
        found = self.generator.recommend([body["history"] for body in batch], max(k))
        return [items[:count] for items, count in zip(found, k, strict=True)]

    def unbatch(self, output: list[Items]) -> list[Items]:
        return output

    def encode_response(self, output: Items) -> dict[str, Items]:
        return {"items": output}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service.generate_servers", description=__doc__)
    parser.add_argument("server", choices=["fastapi", "litserve"])
    parser.add_argument("--bundle", type=Path, default=Path("bundles/demo"))
    parser.add_argument("--port", type=int, default=8001)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.server == "fastapi":
        app = fastapi_app(Generator(given.bundle))
        uvicorn.run(app, port=given.port, http="httptools", loop="uvloop", log_level="warning", access_log=False)
    else:
        api = Batched(given.bundle, max_batch_size=BATCH, batch_timeout=BATCH_TIMEOUT, api_path="/recommend")
        server = litserve.LitServer(api, accelerator="cpu", timeout=False, healthcheck_path="/readyz")
        server.run("127.0.0.1", given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
