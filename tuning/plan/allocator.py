"""Simulation of torch's caching allocator for GPU memory."""

import bisect

MIB = 2**20


class Block:
    """A piece of a segment, linked to its neighbours so that free ones can be merged again."""

    __slots__ = ("address", "free", "next", "previous", "size", "small")

    def __init__(self, address: int, size: int, small: bool):
        self.address, self.size, self.small = address, size, small
        self.free = False
        self.previous = self.next = None


class CachingAllocator:
    """torch's CUDA caching allocator with its default settings (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded up to 512 bytes. Up to 1 MiB they come from segments of 2 MiB; below 10 MiB from segments of
    20 MiB; larger ones get a segment of their own, rounded up to 2 MiB. The smallest free block that is large enough is
    used, and split if more than 1 MiB (small blocks: 512 bytes) remains. Memory is returned to the driver only when a
    new segment would exceed `capacity`: then all entirely free segments are, as torch does before it fails.

    Args:
        expandable: one segment for small and one for large blocks, which grow by 2 and 20 MiB
            (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True).
        capacity: maximum bytes to reserve.
    """

    def __init__(self, expandable: bool = False, capacity: float = float("inf")):
        self.expandable, self.capacity = expandable, capacity
        self.ends: dict[bool, Block] = {}  # last block of each expandable segment
        self.born = 0  # bytes of all segments so far; gives their addresses
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self.by_tag: dict[str, int] = {}  # bytes allocated now, by tag
        self.at_peak: dict[str, int] = {}  # the same at the time of peak_allocated
        self.blocks: dict[object, tuple[Block, str]] = {}  # key -> allocated block, tag
        self.pools = {True: [], False: []}  # small? -> free blocks as (size, address, block), sorted

    def alloc(self, key, size: int, tag: str = "") -> None:
        """Allocate `size` bytes under a new key."""
        if size == 0:
            return
        size = -(-size // 512) * 512
        small = size <= MIB
        pool = self.pools[small]
        at = bisect.bisect_left(pool, (size,))
        if at < len(pool):
            block = pool.pop(at)[2]
        else:
            block = self._grow(size, small) if self.expandable else self._segment(size, small)
        block.free = False
        rest = block.size - size
        if rest >= 512 if small else rest > MIB:
            self._split(block, size)
        self.blocks[key] = block, tag
        self.allocated += block.size
        self.by_tag[tag] = self.by_tag.get(tag, 0) + block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated, self.at_peak = self.allocated, dict(self.by_tag)

    def free(self, key) -> None:
        """Free what was allocated under `key`; does nothing for an empty allocation."""
        if key not in self.blocks:
            return
        block, tag = self.blocks.pop(key)
        self.allocated -= block.size
        self.by_tag[tag] -= block.size
        if block.next is not None and block.next.free:
            self._join(block, block.next)
        if block.previous is not None and block.previous.free:
            block = block.previous
            self._join(block, block.next)
        self._put(block)

    def _segment(self, size: int, small: bool) -> Block:
        """A new segment."""
        size = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        if self.reserved + size > self.capacity:
            self._give_back()
        block = Block(self.born, size, small)
        self._reserve(size)
        return block

    def _grow(self, size: int, small: bool) -> Block:
        """A block at the end of an expandable segment, which grows as far as needed."""
        page = (2 if small else 20) * MIB
        end = self.ends.get(small)
        usable = end.size if end is not None and end.free else 0
        more = -(-(size - usable) // page) * page
        if end is None:
            block = Block((1 << 60) * (1 + small), more, small)  # addresses far away from all others
        elif usable:
            self._leave_pool(end)
            end.size += more
            block = end
        else:
            block = Block(end.address + end.size, more, small)
            block.previous, end.next = end, block
        self.ends[small] = block
        self._reserve(more)
        return block

    def _reserve(self, size: int) -> None:
        if self.reserved + size > self.capacity:
            raise MemoryError(f"{self.reserved + size} bytes exceed the capacity of {self.capacity}")
        self.born += size
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _give_back(self) -> None:
        """Return all entirely free segments to the driver."""
        for pool in self.pools.values():
            for _, _, block in [entry for entry in pool if entry[2].previous is None and entry[2].next is None]:
                self._leave_pool(block)
                self.reserved -= block.size

    def _split(self, block: Block, size: int) -> None:
        """Keep `size` bytes of a block; the rest becomes a free block."""
        rest = Block(block.address + size, block.size - size, block.small)
        block.size = size
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        if self.ends.get(block.small) is block:
            self.ends[block.small] = rest
        self._put(rest)

    def _join(self, first: Block, second: Block) -> None:
        """Merge two neighbours into one block; free ones are removed from the pool."""
        for block in (first, second):
            if block.free:
                self._leave_pool(block)
        if self.ends.get(first.small) is second:
            self.ends[first.small] = first
        first.size += second.size
        first.next = second.next
        if first.next is not None:
            first.next.previous = first

    def _leave_pool(self, block: Block) -> None:
        pool = self.pools[block.small]
        del pool[bisect.bisect_left(pool, (block.size, block.address))]
        block.free = False

    def _put(self, block: Block) -> None:
        block.free = True
        bisect.insort(self.pools[block.small], (block.size, block.address, block))
