"""What else could run the network of a search on one core: the same decoder calls by other libraries.

    OMP_NUM_THREADS=1 python -m benchmarks.engine.steps

The decoder calls of a search (normalised by block, as bundles are) are recorded; every contender repeats all of them:

    eager               T5.decode in torch
    ONNX, int8          the runtimes `onnx` and `onnx-int8`
    OpenVINO            the graph of `onnx`, in float32; where `pip install openvino` was run
    Inductor            torch.compile with constant, packed weights, for any number of rows; needs a C++ compiler.
                        AOTInductor writes the same kernels to a file

Rows of the part `search` are whole searches from encoder states by the runtimes there are. `times_floor` compares with
the matrix products alone (`floor.py`) by the faster of two libraries, measured in the same turns. `difference` is the
largest of all outputs of the decoder compared with eager torch, as a share of the largest output.

Times are CPU time of the process: medians over runs in turns. A contender that cannot run here says why in `missing`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.common import ROOT, Run, argument_parser, result_file, table
from benchmarks.engine.contenders import Case, Model, make_case, make_model, ours
from benchmarks.engine.floor import Pass, in_onnx, in_order, in_torch
from benchmarks.engine.peers_measure import RUNTIMES, SEED, Row, in_turns, products_of_case
from benchmarks.engine.sizes import ITEMS, SIZES, VOCABULARY, clustered_codes
from serving.items.vocabulary import Vocabulary
from serving.network import onnx_graph
from serving.network.eager import EagerRuntime
from serving.network.onnx import OnnxRuntime
from serving.network.t5 import CrossKeysValues, KeysValues, ModelConfig

SHAPES = ((1, 50), (8, 50))  # batch, beams
STEPS = (0, 4)
FLOORS = {"floor, torch": in_torch, "floor, ONNX": in_onnx}
COLUMNS = ["part", "contender", "batch", "beams", "steps", "ms", "times_floor", "difference", "missing"]


@dataclass(frozen=True)
class Call:
    """What `EagerRuntime.step` is given."""

    x: torch.Tensor
    bias: torch.Tensor
    cross: CrossKeysValues
    past: KeysValues | None


Decoder = Callable[[Call], Callable[[], torch.Tensor]]  # prepares a call, which is not timed; running it is


class Missing(Exception):
    """Why a contender cannot run here."""


def main() -> None:
    parser = argument_parser("benchmarks.engine.steps", __doc__)
    parser.add_argument("--seconds", type=float, default=8, help="time for all turns of one case")
    parser.add_argument("--out", type=result_file, default=ROOT / "benchmarks/results/steps.json")
    options = parser.parse_args()
    run = Run(parser, options)
    rows = measure(SIZES["5M"], VOCABULARY, ITEMS, SHAPES, STEPS, options.seconds)
    print(table(rows, COLUMNS))
    run.record(options.out, [SEED], rows, items=ITEMS)


def measure(
    config: ModelConfig,
    vocabulary: Vocabulary,
    items: int,
    shapes: Sequence[tuple[int, int]],
    steps: Sequence[int],
    seconds: float,
) -> list[Row]:
    codes = clustered_codes(items, vocabulary.tokens_per_item, vocabulary.codebook_sizes[0], SEED)
    model = make_model(config, vocabulary, codes, SEED)
    decoders, missing = make_decoders(model)
    searches = {name: ours(model, make(model), normalise="block") for name, make in RUNTIMES.items()}
    rows: list[Row] = []
    for batch, beams in shapes:
        for count in steps:
            print(f"{batch}x{beams}, {count} steps", file=sys.stderr, flush=True)
            case = make_case(model, count, batch, beams, SEED)
            passes = products_of_block_search(model, case)
            with torch.inference_mode():
                runs = {name: partial(search.answer, case) for name, search in searches.items()}
                rows += compare("search", case, runs, passes, seconds)
            with torch.no_grad():  # Inductor takes weights as constants in this mode only
                rows += compare_decoders(model, case, decoders, [one for one in passes if one.kind == "step"], seconds)
    return rows + [{"part": "decoder", "contender": name, "missing": why} for name, why in missing.items()]


def compare(
    part: str, case: Case, runs: Mapping[str, Callable[[], Any]], passes: list[Pass], seconds: float
) -> list[Row]:
    """A row for every run, and for the floor: these passes."""
    floors = {name: in_order(make(passes)) for name, make in FLOORS.items()}
    cpu, _ = in_turns(dict(runs) | floors, seconds)
    ms = {name: statistics.median(times) * 1000 for name, times in cpu.items()}
    floor = min(ms[name] for name in floors)
    shape = {"part": part, "batch": case.batch, "beams": case.beams, "steps": case.steps}
    return [
        shape | {"contender": name, "ms": round(ms[name], 2), "times_floor": round(ms[name] / floor, 2)} for name in ms
    ]


def compare_decoders(
    model: Model, case: Case, decoders: Mapping[str, Decoder], passes: list[Pass], seconds: float
) -> list[Row]:
    calls, outputs = record(model, case)
    scale = max(float(output.abs().max()) for output in outputs)
    runs, difference = {}, {}
    for name, decoder in decoders.items():
        prepared = [decoder(call) for call in calls]
        found = [run().clone() for run in prepared]
        apart = max(float((one - two).abs().max()) for one, two in zip(found, outputs, strict=True))
        runs[name], difference[name] = partial(_all, prepared), round(apart / scale, 6)
    rows = compare("decoder", case, runs, passes, seconds)
    return [row | {"difference": difference.get(row["contender"])} for row in rows]


def _all(runs: Sequence[Callable[[], Any]]) -> None:
    for run in runs:
        run()


def products_of_block_search(model: Model, case: Case) -> list[Pass]:
    lo, hi = model.vocabulary.reasoning_range
    levels = [end - first for first, end in model.vocabulary.level_ranges]
    return products_of_case(model, case, [hi - lo] * case.steps + levels)


def record(model: Model, case: Case) -> tuple[list[Call], list[torch.Tensor]]:
    """The decoder calls of one search by eager torch, and what they return, (B, Q, D) each."""
    calls: list[Call] = []
    outputs: list[torch.Tensor] = []

    class Recorder(EagerRuntime):
        def step(
            self, x: torch.Tensor, bias: torch.Tensor, cross: CrossKeysValues, past: KeysValues | None
        ) -> tuple[torch.Tensor, KeysValues]:
            calls.append(Call(x, bias, cross, past))
            hidden, present = super().step(x, bias, cross, past)
            outputs.append(hidden)
            return hidden, present

    ours(model, Recorder(model.network, model.item_tokens, "bidirectional"), normalise="block").answer(case)
    return calls, outputs


# The contenders


def make_decoders(model: Model) -> tuple[dict[str, Decoder], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    decoders: dict[str, Decoder] = {}
    missing: dict[str, str] = {}
    for name, make in DECODERS.items():
        try:
            decoders[name] = make(model)
        except Missing as why:
            missing[name] = str(why)
    return decoders, missing


def in_eager(model: Model) -> Decoder:
    decode = model.network.t5.decode
    return lambda call: lambda: decode(call.x, call.bias, call.cross, call.past)[0]


def in_onnx_runtime(model: Model, int8: bool = False) -> Decoder:
    runtime = OnnxRuntime(model.network, model.item_tokens, "bidirectional", int8=int8)

    def prepare(call: Call) -> Callable[[], torch.Tensor]:
        cross, past = _cross_of(call), _past_of(call)
        return lambda: runtime.step(call.x, call.bias, CrossKeysValues(cross, call.cross.bias), past)[0]

    return prepare


def in_openvino(model: Model) -> Decoder:
    try:
        import openvino
    except ModuleNotFoundError:
        raise Missing("openvino is not installed") from None
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(onnx_graph.step(model.network.t5, int8=False)), "CPU", options)
    names = [value.get_any_name() for value in compiled.inputs]
    request = compiled.create_infer_request()

    def prepare(call: Call) -> Callable[[], torch.Tensor]:
        arrays = (call.x.numpy(), call.bias.numpy(), call.cross.bias.numpy(), *_cross_of(call), *_past_of(call))
        inputs = dict(zip(names, arrays, strict=True))

        def run() -> torch.Tensor:
            request.infer(inputs, share_inputs=True, share_outputs=True)
            return torch.from_numpy(request.get_tensor("hidden").data)

        return run

    return prepare


def in_inductor(model: Model) -> Decoder:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Missing("there is no C++ compiler")
    compiled = torch.compile(model.network.t5.decode, dynamic=True, options={"freezing": True})
    torch._dynamo.config.recompile_limit = 64  # one row, one request and an empty past are compiled apart

    def prepare(call: Call) -> Callable[[], torch.Tensor]:
        past = call.past and [(keys.contiguous(), values.contiguous()) for keys, values in call.past]
        return lambda: compiled(call.x, call.bias, call.cross, past)[0]

    return prepare


DECODERS: dict[str, Callable[[Model], Decoder]] = {
    "eager": in_eager,
    "ONNX": in_onnx_runtime,
    "int8": partial(in_onnx_runtime, int8=True),
    "OpenVINO": in_openvino,
    "Inductor": in_inductor,
}


def _cross_of(call: Call) -> Any:
    """As `OnnxRuntime.cross_keys_values` lays them out."""
    return [part.transpose(1, 2).flatten(2).contiguous().numpy() for layer in call.cross.layers for part in layer]


def _past_of(call: Call) -> Any:
    """As `OnnxRuntime.step` returns them, of length 0 before the first call."""
    past = call.past or [(keys[:, :, :0], values[:, :, :0]) for keys, values in call.cross.layers]
    return [part.contiguous().numpy() for layer in past for part in layer]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
