"""Generation in slots: a row that has finished makes room for the next, so that no row waits for a longer answer.

transformers' continuous batching does this for causal attention with one position per token. ChatGLM-6B has a context
that is seen in both directions and two positions per token, and P-Tuning has a prefix; so this is done here.

What is computed for a row does not depend on the other rows: a step always has as many rows as there are slots, prompts
are computed in groups that the caller fixes, and the keys of a row stand at the beginning of its slot.
"""

import functools
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache

BLOCK = 64  # keys of a slot, with the prefix, come in multiples of this: sums of other lengths are rounded otherwise


class Request(NamedTuple):
    """A prompt to answer.

    row: any number, to know the answer by.
    prompt: ids.
    limit: maximum ids of the answer. 0: it has been answered before; the prompt is computed all the same, so that the
        numbers of the others in its group stay as they were.
    seed: of this row's random numbers, with do_sample.
    """

    row: int
    prompt: list[int]
    limit: int
    seed: int = 0


class Answer(NamedTuple):
    """The answer to a request: ids without the stop token, and whether it ended with one."""

    row: int
    ids: list[int]
    ended: bool


class _Row:
    """A row that is being answered.

    positions: position ids of the answer's tokens, [tokens] or [axes, tokens], on the CPU.
    keys: the prompt's keys and values in every layer, until the row has a slot: [2, heads, tokens, head_dim] each.
    """

    def __init__(self, request: Request, positions: torch.Tensor, keys: list[torch.Tensor], device: torch.device):
        self.request, self.positions, self.keys = request, positions, keys
        self.ids: list[int] = []
        self.ended = False
        self.generator = torch.Generator(device).manual_seed(request.seed)
        self.processors = None  # of logits: transformers' list, made when the first token is chosen

    @property
    def is_complete(self) -> bool:
        return self.ended or len(self.ids) == self.request.limit

    @property
    def newest(self) -> int:
        """Index of the newest token, counted from the beginning of the prompt."""
        return len(self.request.prompt) + len(self.ids) - 1


class SlotCache:
    """Keys and values of rows of different lengths; those of a row stand at the beginning of its slot.

    What the models ask of a cache: `update` and `get_seq_length`.

    Args:
        prefix: length of the P-Tuning prefix, which attention puts before the keys.
    """

    def __init__(self, slots: int, prefix: int):
        self.slots, self.prefix = slots, prefix
        self.layers: list[torch.Tensor] = []  # [2, slots, heads, at least room, head_dim] each
        self.room = 0  # keys of each slot that are in use
        self.newest = None  # index of the token that each slot adds, [slots]

    def fit(self, keys: int) -> None:
        """Give each slot room for so many keys. Memory follows: up at once, down when half of it is not needed."""
        self.room = -(-(keys + self.prefix) // BLOCK) * BLOCK - self.prefix
        held = self.layers[0].shape[3] if self.layers else 0
        if held < self.room or held + self.prefix > 2 * (self.room + self.prefix):
            for i, old in enumerate(self.layers):  # one by one: two copies of a layer at a time
                self.layers[i] = old.new_zeros(*old.shape[:3], self.room, old.shape[4])
                self.layers[i][:, :, :, :held].copy_(old[:, :, :, : self.room])
                del old

    def put(self, slot: int, keys: list[torch.Tensor]) -> None:
        """Fill a slot with the keys and values of a prompt, see _Row; there must be room."""
        if not self.layers:
            self.layers = [one.new_zeros(2, self.slots, one.shape[1], self.room, one.shape[3]) for one in keys]
        for layer, one in zip(self.layers, keys, strict=True):
            layer[:, slot, :, : one.shape[2]] = one
            layer[:, slot, :, one.shape[2] :] = 0  # hidden keys must be finite: 0 * inf would reach the row

    def get_seq_length(self) -> int:
        return self.room

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token to each slot: keys and values [slots, heads, 1, head_dim]. Returns all of them."""
        every = torch.arange(self.slots, device=keys.device)
        for held, new in zip(self.layers[layer], (keys, values), strict=True):
            held[every, :, self.newest] = new[:, :, 0]
        held = self.layers[layer][:, :, :, : self.room]
        return held[0], held[1]


class _Chooser:
    """Chooses next tokens from logits as `generate` does; each row has random numbers of its own.

    Args:
        options: of `generate`: do_sample, top_p, temperature, repetition_penalty.
    """

    def __init__(self, model, tokenizer, options: dict):
        config, _ = model._prepare_generation_config(None, **{"do_sample": False} | options)
        config.eos_token_id = tokenizer.stop_token_ids
        model._prepare_special_tokens(config, True, device=model.device)
        self.sample = config.do_sample
        self.make = functools.partial(model._get_logits_processor, config, device=model.device)
        self.is_plain = not self.sample and not self.make(input_ids_seq_length=1)

    def choose(self, logits: torch.Tensor, rows: list[_Row]) -> list[int]:
        """The next token of each row; logits [rows, vocabulary]."""
        scores = logits.float()
        if self.is_plain or not rows:
            return scores.argmax(-1).tolist()
        return torch.cat([self._choose_one(scores[i : i + 1], row) for i, row in enumerate(rows)]).tolist()

    def _choose_one(self, scores: torch.Tensor, row: _Row) -> torch.Tensor:
        if row.processors is None:
            row.processors = self.make(input_ids_seq_length=len(row.request.prompt))
        ids = torch.tensor([row.request.prompt + row.ids], device=scores.device)
        scores = row.processors(ids, scores)
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=row.generator)[0]


class _Slots:
    """Rows that are answered together, and those whose prompts are computed and that wait for a slot."""

    def __init__(self, model, tokenizer, slots: int, options: dict):
        self.model, self.pad, self.stop = model, tokenizer.pad_token_id, tokenizer.stop_token_ids
        self.chooser = _Chooser(model, tokenizer, options)
        self.cache = SlotCache(slots, model.config.pre_seq_len or 0)
        self.rows: list[_Row | None] = [None] * slots
        self.waiting: deque[_Row] = deque()

    def prefill(self, group: list[Request]) -> list[Answer]:
        """Compute the prompts of a group, and the first token of each answer. Returns the answers that end there."""
        device, cache = self.model.device, DynamicCache()
        longest = max(len(request.prompt) for request in group)
        before = [longest - len(request.prompt) for request in group]
        ids = [[self.pad] * pad + request.prompt for pad, request in zip(before, group, strict=True)]
        real = torch.arange(longest, device=device) >= torch.tensor(before, device=device)[:, None]
        logits = self.model(
            torch.tensor(ids, device=device), attention_mask=real.long(), cache=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        wanted = [i for i, request in enumerate(group) if request.limit]
        rows = []
        for i in wanted:
            # cloned: a part of the group's tensors would keep all of them in memory
            keys = [torch.stack((layer.keys[i], layer.values[i]))[:, :, before[i] :].clone() for layer in cache.layers]
            rows.append(_Row(group[i], self._answer_positions(group[i]), keys, device))
        answers = self._add_tokens(rows, logits[wanted])
        self.waiting += [row for row in rows if not row.is_complete]
        return answers

    def _answer_positions(self, request: Request) -> torch.Tensor:
        """Position ids of the tokens of an answer, as the family counts them: [limit] or [axes, limit]."""
        ids = torch.tensor([request.prompt + [self.pad] * request.limit])
        return self.model.transformer.default_positions(ids, torch.ones_like(ids), 0)[0, ..., len(request.prompt) :]

    def _add_tokens(self, rows: list[_Row], logits: torch.Tensor) -> list[Answer]:
        """Add the next token to each row. Returns the answers that end with it."""
        for row, token in zip(rows, self.chooser.choose(logits, rows), strict=True):
            if token in self.stop:
                row.ended = True
            else:
                row.ids.append(token)
        return [Answer(row.request.row, row.ids, row.ended) for row in rows if row.is_complete]

    def fill(self) -> None:
        """Give free slots to rows that wait."""
        placed = []
        for slot, row in enumerate(self.rows):
            if row is None and self.waiting:
                self.rows[slot] = self.waiting.popleft()
                placed.append(slot)
        if any(self.rows):
            self.cache.fit(1 + max(row.newest for row in self.rows if row))
        for slot in placed:
            self.cache.put(slot, self.rows[slot].keys)
            self.rows[slot].keys = []

    def step(self) -> list[Answer]:
        """One more token for each row in a slot. Returns the answers that end with it."""
        device = self.model.device
        some = next(row for row in self.rows if row)
        nowhere = torch.zeros_like(some.positions[..., 0])  # the position of a free slot
        # the newest token of a row has no keys in the cache yet
        tokens = [[row.ids[-1] if row else self.pad] for row in self.rows]
        positions = [row.positions[..., len(row.ids) - 1] if row else nowhere for row in self.rows]
        self.cache.newest = torch.tensor([row.newest if row else 0 for row in self.rows], device=device)
        visible = torch.arange(self.cache.room, device=device) <= self.cache.newest[:, None]
        logits = self.model(
            torch.tensor(tokens, device=device),
            attention_mask=visible[:, None, None],
            position_ids=torch.stack(positions)[..., None].to(device),
            cache=self.cache,
            use_cache=True,
        ).logits[:, -1]
        active = [slot for slot, row in enumerate(self.rows) if row]
        answers = self._add_tokens([self.rows[slot] for slot in active], logits[active])
        self.rows = [None if row is None or row.is_complete else row for row in self.rows]
        return answers


@torch.no_grad()
def generate_in_slots(model, tokenizer, groups: Iterator[list[Request]], slots: int, **options) -> Iterator[Answer]:
    """Answers in the order in which they end; greedy unless the options say otherwise.

    Args:
        groups: requests whose prompts are computed together; each is taken when there is a slot for its first row. The
            rows of a group wait for slots with their keys and values.
        slots: how many rows are answered at a time.
        options: of `generate`: do_sample, top_p, temperature, repetition_penalty. No beams.
    """
    running = _Slots(model, tokenizer, slots, options)
    more = True
    while more or running.waiting or any(running.rows):
        while more and len(running.waiting) < running.rows.count(None):
            group = next(groups, None)
            more = group is not None
            if more:
                yield from running.prefill(group)
        running.fill()
        if any(running.rows):
            yield from running.step()
