"""The device `meta`, where tensors have shapes and no values: whatever runs there takes no decision on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serving.types import Beams


class OffTheDevice(TorchDispatchMode):
    """Collects every operation that reads or makes a tensor anywhere but on `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.found.append(func._schema.name)
        return made


def captured_once(run: Callable[[], Beams]) -> tuple[Callable[[], None], Beams]:
    """A capture for `GraphSearch` that runs the search once; a replay does nothing."""
    return lambda: None, run()
