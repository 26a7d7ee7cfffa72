"""How torch takes memory: told by variables that it reads when it is imported, so set before that."""

import os

# The older of two names, which torch reads first: it must not hide what a user has set under the newer one.
NAME, NEWER = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def let_segments_grow() -> None:
    """Unless the user has settings of their own. Fragmentation otherwise costs a training 2 to 5 GiB (simulated), and
    in prediction the keys and values of a growing answer need new blocks again and again.
    """
    if NEWER not in os.environ:
        os.environ.setdefault(NAME, "expandable_segments:True")


def use_large_pages() -> None:
    """Large tensors of main memory in large pages: page faults would take 7 % of a CPU's time."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
