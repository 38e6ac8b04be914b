"""Hugging Face folders a sidecar can load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .weights import safetensors
from .weights.layout import PayloadLayout
from .weights.tensors import sources

if TYPE_CHECKING:
    from .weights.tensors import Weights


def save(folder: str | PathLike[str], weights: Weights, config: Mapping[str, Any], *, dtype: Literal["bfloat16"] | None = "bfloat16") -> Path:
    """Writes config.json and model.safetensors.

    Args:
        folder: Created where it is missing.
        weights: As ``Rollout.push_weights`` takes them.
        config: Of the model, as transformers has it: model_type, hidden_size, ...
        dtype: bfloat16: floating-point tensors are rounded to it. None: written as they are.

    Returns:
        The folder.
    """
    tensors = sources(weights, dtype)
    header = safetensors.header(PayloadLayout(tensors, alignment=1), tensors, {"format": "pt"})

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        scratch = memoryview(bytearray(max(tensor.piece_bytes for tensor in tensors)))
        for tensor in tensors:
            tensor.copy_to(lambda start, size: scratch[:size], file.write)
    return folder
