"""Runs of keys of one group: what a prompt's layout tells the prefill kernel beforehand.

A prompt is text | video | audio | video | text: a few runs, known on the host when the prompt is built. A tile of keys
that one run covers needs no look at its keys' groups.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

MIXED = -1  # a tile of keys of several groups

Run = tuple[int, int]  # (keys, group)
Runs = tuple[tuple[Run, ...], ...]  # of each request, from key 0 on


def find_runs(key_group: Tensor, key_length: Tensor) -> Runs:
    """The runs of key_group i32 [B, L] up to key_length i32 [B]. Waits for the device, so call it once for a prompt."""
    found = []
    for ids, length in zip(key_group.cpu(), key_length.tolist(), strict=True):
        values, counts = torch.unique_consecutive(ids[:length], return_counts=True)
        found.append(tuple(zip(counts.tolist(), values.tolist(), strict=True)))
    return tuple(found)


def tile_groups(runs: Sequence[Sequence[Run]], *, capacity: int, block: int) -> list[list[int]]:
    """The group of each tile of `block` keys, MIXED where its keys differ: [B][ceil(capacity / block)].

    Slots behind a request's last run count for no group; a tile without a key is MIXED.
    """
    table = []
    for request in runs:
        tiles: list[set[int]] = [set() for _ in range(-(-capacity // block))]
        start = 0
        for keys, group in request:
            for tile in range(start // block, -(-(start + keys) // block)):
                tiles[tile].add(group)
            start += keys
        table.append([groups.pop() if len(groups) == 1 else MIXED for groups in tiles])
    return table


@lru_cache(maxsize=64)
def tile_group_tensor(runs: Runs, capacity: int, block: int, device: torch.device) -> Tensor:
    """`tile_groups` on a device, i32 [B, T]; made once for a prompt and read by every layer."""
    return torch.tensor(tile_groups(runs, capacity=capacity, block=block), dtype=torch.int32, device=device)


def mixed_share(runs: Sequence[Sequence[Run]], *, block: int) -> float:
    """Part of the tiles with keys, of all requests, that hold several groups; 1 where there is none."""
    mixed, tiles = 0, 0
    for request in runs:
        length = sum(keys for keys, _ in request)
        row = tile_groups([request], capacity=length, block=block)[0]
        mixed, tiles = mixed + row.count(MIXED), tiles + len(row)
    return mixed / tiles if tiles else 1.0
