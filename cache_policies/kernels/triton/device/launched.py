"""Functions that the host launches, and which of their arguments Triton compiles nothing for.

Triton compiles a function again where an integer is 1, divisible by 16 or neither, and where a
tensor begins at a multiple of 16 bytes or elsewhere: for seconds, while the engine waits.
"""

from functools import partial

import triton

# By name, of all functions. No vector is loaded or stored at a place that these decide; strides and
# tensors that are fixed for a layer are not among them, for what is known of those makes vectors.
VARYING = (
    # the counts of a step, which lie behind one another in one piece of memory
    "query_start", "stored_count", "ring_count", "stored_after", "appended", "store_row",
    "tasks", "lines", "blocks", "position", "first_query", "first_token", "place",
    # block tables, slot maps and lists of pages, of any width, or rows of them
    "table", "table_stride", "row", "slots", "slots_stride",
    "chosen", "count", "lists", "width", "list_queries", "flags", "flag_pages",
    # tokens and parts of one request
    "index", "stored", "ring", "held", "start", "head_rows", "mass_stride", "splits", "parts",
)  # fmt: skip

launched = partial(triton.jit, do_not_specialize=VARYING)
