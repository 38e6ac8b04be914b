"""The header of a safetensors file, https://github.com/huggingface/safetensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .layout import PayloadLayout
from .tensors import TensorSource


def header(layout: PayloadLayout, tensors: Sequence[TensorSource], metadata: Mapping[str, str] | None = None) -> bytes:
    """Its length and JSON, padded so that the data starts on an 8-byte boundary. The layout must have no gaps.

    Raises:
        ValueError: Sparse tensors, or several slices of one; lists all of them.
    """
    counts = Counter(tensor.name for tensor in tensors)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"a safetensors file holds one slice of a tensor, these have several: {', '.join(twice)}")
    sparse = [tensor.name for tensor in tensors if tensor.sparse_count is not None]
    if sparse:
        raise ValueError(f"a safetensors file holds whole tensors, these are sparse: {', '.join(sparse)}")
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    for tensor, offset in zip(tensors, layout.offsets):
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.sent_shape, "data_offsets": [offset, offset + tensor.bytes]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
