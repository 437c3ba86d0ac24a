"""Sizes of the engine's programs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PagedSizes:
    """Sizes that the engine's programs are compiled for.

    Attributes:
        rows: rows of the decode program.
        pages: pages of the pool.
        page_size: tokens in a page.
        table_width: pages in a row's table.
        chunk_pages: pages of prompts that the prefill program takes.
        state_rows: rows of the TokenState.
        decode_steps: width of ``Rows.known``.
        eos_ids: width of ``Rows.eos_ids``.
    """

    rows: int
    pages: int
    page_size: int
    table_width: int
    chunk_pages: int
    state_rows: int
    decode_steps: int
    eos_ids: int
