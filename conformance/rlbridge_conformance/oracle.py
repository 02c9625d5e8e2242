"""The truth about the weights: the safetensors that the trainer saves, cut by the sink's layout. Neither end's digests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from rlbridge.sync.messages import Box
from rlbridge.weights.layout import Region
from rlbridge_conformance.checks import Mismatch


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a Hugging Face directory."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no dict)
    return found


def compare(saved: Mapping[str, torch.Tensor], engine: str, ranks: Sequence[Sequence[Box]]) -> None:
    """Hold what an engine serves, all its ranks together, to the saved tensors: every byte of every one.

    Raises:
        Mismatch: a box differs, or a tensor is not wholly there; the tensor is named.
    """
    for rank, boxes in enumerate(ranks):
        for box in boxes:
            _compare_box(saved, f"{engine}.rank[{rank}]", box)
    for name, tensor in saved.items():
        regions = {box.region for boxes in ranks for box in boxes if box.region.tensor == name}
        covered = _volume(regions)
        if covered != tensor.numel():
            raise Mismatch(f"{engine} holds all of {name}", f"{tensor.numel()} elements", f"{covered}")


def _compare_box(saved: Mapping[str, torch.Tensor], where: str, box: Box) -> None:
    region = box.region
    if region.tensor not in saved:
        raise Mismatch(f"{where} holds tensors of the saved checkpoint", sorted(saved), region.tensor)
    expected = cut(saved[region.tensor], region).to(getattr(torch, box.dtype)).contiguous().reshape(-1)
    raw = expected.view(torch.uint8).numpy()
    what = f"{where} serves {region} bit for bit as saved"
    if raw.nbytes != len(box.raw):
        raise Mismatch(what, f"{raw.nbytes} bytes", f"{len(box.raw)} bytes")
    differ = (raw != np.frombuffer(box.raw, dtype=np.uint8)).reshape(expected.numel(), -1).any(1)
    if differ.any():
        first = int(differ.argmax())
        got = torch.frombuffer(bytearray(box.raw), dtype=expected.dtype)
        raise Mismatch(
            what,
            f"{expected[first].item()!r} at element {first}",
            f"{got[first].item()!r}; {int(differ.sum())} of {expected.numel()} elements differ",
        )


def cut(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The region's box of a full tensor."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]


def _volume(regions: Iterable[Region]) -> int:
    """Elements in the union of boxes: of any two that the plan cuts, either is the other or they are apart."""
    distinct = list(dict.fromkeys(regions))
    kept = [r for i, r in enumerate(distinct) if not any(r.intersect(other) for other in distinct[:i])]
    return sum(math.prod(r.shape) for r in kept)
