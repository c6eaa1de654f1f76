"""Numbers in few bits: each block of a row has a scale, and each number is the nearest of a table's, times that scale.

Blocks never cross rows, so that any share of the rows can be read and written alone. The tables:
- NORMAL: NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E), 16 quantiles of a normal
  distribution, two to a byte, the first in the upper half, as bitsandbytes has them;
- SIGNED, UNSIGNED: dynamic trees of 8 bits (Dettmers 2016, https://arxiv.org/abs/1511.04561, as used by Dettmers et al.
  2022, https://arxiv.org/abs/2110.02861): seven decades, the larger ones in finer steps.

Shapes: any rows, C numbers of a row, b blocks of a row.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _dynamic(signs: int) -> tuple[float, ...]:
    """0, 1, and of each decade the middles of equal steps, twice as many as in the decade below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + 2 - signs) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        values += middles + [-value for value in middles] * (signs - 1)
    return tuple(sorted(values))


SIGNED, UNSIGNED = _dynamic(2), _dynamic(1)
Table = tuple[float, ...]


@cache
def _on(table: Table, device: torch.device) -> tuple[Tensor, Tensor]:
    """A table, and the points halfway between its numbers."""
    values = torch.tensor(table, dtype=torch.float64)
    return values.float().to(device), ((values[:-1] + values[1:]) / 2).float().to(device)


def encode(values: Tensor, table: Table, block: int, scales_in: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(.., C) float32 -> places in the table (.., C) as uint8, and scales (.., b): the blocks' largest magnitudes."""
    columns = values.shape[-1]
    padded = F.pad(values, (0, -columns % block)) if columns % block else values
    blocks = padded.unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1).to(scales_in)
    units = blocks / scales.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(units, _on(table, values.device)[1], out_int32=True).to(torch.uint8)
    return codes.flatten(-2)[..., :columns].contiguous(), scales


def decode(codes: Tensor, scales: Tensor, table: Table, block: int) -> Tensor:
    """The inverse of `encode`, up to rounding: (.., C) float32."""
    columns = codes.shape[-1]
    padded = F.pad(codes, (0, -columns % block)) if columns % block else codes
    units = _on(table, codes.device)[0][padded.int()].unflatten(-1, (-1, block))
    return (units * scales.float()[..., None]).flatten(-2)[..., :columns]


def pack(codes: Tensor) -> Tensor:
    """Places below 16, two to a byte: (.., C) -> (.., half of C, rounded up)."""
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., ::2] << 4 | even[..., 1::2]


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.stack([packed >> 4, packed & 15], -1).flatten(-2)[..., :columns]
