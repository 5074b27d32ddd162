# mypy: ignore-errors
"""The two Triton programs that the `triton` kernel's products are made of. Imported only where Triton is there.

What checks annotations at run time (jaxtyping's import hook) must leave them alone: Triton reads a program's globals.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def weighted_sums(  # noqa: D103  (Triton compiles the source: what it does is said below)
    pointers, columns, values, source, out, width, stride_row, stride_column, BLOCK: tl.constexpr, TOTAL: tl.constexpr
):
    # out[r] = Σ_e values[e] source[columns[e]] over the entries pointers[r] … pointers[r + 1] − 1:
    # one program per row and block of columns, its sum kept in registers, entries in their order (no atomics)
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < width
    total = tl.zeros([BLOCK], dtype=TOTAL)
    start = tl.load(pointers + row)
    end = tl.load(pointers + row + 1)
    for entry in range(start, end):
        column = tl.load(columns + entry).to(tl.int64)
        weight = tl.load(values + entry)
        part = tl.load(source + column * stride_row + place * stride_column, mask=inside, other=0.0)
        total += weight.to(TOTAL) * part.to(TOTAL)
    tl.store(out + row * width + place, total, mask=inside)


@triton.jit
@no_type_check
def entry_products(  # noqa: D103
    rows, columns, left, right, out, entries, width, stride_left, stride_right,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    # out[e] = ⟨left[rows[e]], right[columns[e]]⟩: one program per ENTRIES entries, over blocks of columns; both
    # factors have columns side by side. Entries of one row are neighbours: its part of `left` comes from the cache
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    exists = entry < entries
    row = tl.load(rows + entry, mask=exists, other=0).to(tl.int64)
    column = tl.load(columns + entry, mask=exists, other=0).to(tl.int64)
    total = tl.zeros([ENTRIES], dtype=TOTAL)
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = exists[:, None] & (place < width)[None, :]
        a = tl.load(left + row[:, None] * stride_left + place[None, :], mask=inside, other=0.0)
        b = tl.load(right + column[:, None] * stride_right + place[None, :], mask=inside, other=0.0)
        total += tl.sum(a.to(TOTAL) * b.to(TOTAL), axis=1)
    tl.store(out + entry, total, mask=exists)
