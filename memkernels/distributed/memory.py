"""An external memory whose rows lie in shards on several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from memkernels._checks import FLOATS, Signature, check_choice, check_flag, fail
from memkernels._compat import no_autocast
from memkernels.distributed._collectives import agree, check_group, check_held, gathered, speaking, summed, tell
from memkernels.distributed._first_order import first_order
from memkernels.ops._attention import softmax_scale
from memkernels.ops.attention import attention
from memkernels.ops.topk_read import MOST, topk_read
from memkernels.ops.weighted_bag import weighted_bag

NAME = "ShardedMemory"
SIMILARITIES = ("cosine", "dot", "l2")
EPS = 1e-6  # as in content_read


class ShardedMemory:
    """N rows of a memory over the ranks of a process group, in rank order; reads are exact, as if one process held all of them.

    Every rank asks for its own queries; they travel to all shards, and what the shards answer is merged. All ranks of the group must make
    each call, and its backward, together. Under autocast too reads are in the memory's dtype, to which queries are brought.

    Args:
        key: "n W", this rank's rows (global rows offset to offset + n - 1); float64, float32, bfloat16 or float16. n may differ, and be 0.
        value: "n V", what is read; None: the rows themselves. May need gradients, like `key`.
        group: the process group; None is the default group.

    Attributes: `key`, `value`, `rows` (N), `offset` (the global index of the first own row), `sizes` (n of each rank).

    Gradients: of reads, to queries, strengths and the own rows, keys and values; on each rank those of the sum of all ranks' losses.
        First order only.

    Raises: RuntimeError without a process group, or where another rank refused its arguments; ValueError, TypeError, IndexError for
        arguments of this rank, or that differ between ranks.

    Example:
        >>> memory = ShardedMemory(torch.randn(1000, 64))  # on each of 4 ranks: N = 4000  # doctest: +SKIP
        >>> read = memory.content_read(torch.randn(8, 64), torch.ones(8))  # "8 64"  # doctest: +SKIP
    """

    def __init__(self, key: torch.Tensor, value: torch.Tensor | None = None, *, group: dist.ProcessGroup | None = None):
        check_group(NAME, group)
        self.group = group

        def plan() -> dict[str, float]:
            dims = SHARD(key, value)
            check_held(NAME, key=key)
            return {
                "W": dims["W"],
                "V": dims.get("V", dims["W"]),
                "dtype": FLOATS.index(key.dtype),
                "value": value is not None,
                "n": dims["n"],
            }

        device = speaking(key.device if isinstance(key, torch.Tensor) else "cpu")
        plans = agree(NAME, "key", ("W", "V", "dtype", "value"), ("n",), plan, device, group)
        self.key, self.value, self.rank = key, value, dist.get_rank(group)
        self.sizes = [int(p["n"]) for p in plans]
        self.rows, self.offset = sum(self.sizes), sum(self.sizes[: self.rank])

    def content_read(
        self, key: torch.Tensor, strength: torch.Tensor, *, similarity: str = "cosine", mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`content_read` of all rows: softmax over all N of strength times the similarity to the key, then the weighted sum.

        Args:
            key: "R W", this rank's keys; R may differ from rank to rank. strength: "R". similarity: "cosine", "dot" or "l2".
            mask: bool "n" of this rank's rows, True = the row takes part.

        Returns:
            read "R V": each shard reads with its own softmax, and the parts are merged by their log-sum-exp. In float32 (float64 for
            float64); "l2" is computed as 2 k . m - |m|^2, whose rounding goes with |m|^2.
        """

        def plan() -> dict[str, float]:
            dims = CONTENT(self.key, key, strength, mask)
            check_choice(NAME, "similarity", similarity, SIMILARITIES)
            wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (key, strength, self.key, self.value))
            return {"similarity": SIMILARITIES.index(similarity), "gradients": wants, "R": dims["R"]}

        plans = agree(NAME, "key", ("similarity", "gradients"), ("R",), plan, self.key.device, self.group)
        sizes = [int(p["R"]) for p in plans]
        with no_autocast(self.key.device.type):
            key, strength = key.to(self.key.dtype), strength.to(self.key.dtype)
            wants = bool(plans[self.rank]["gradients"])
            return _ContentRead.apply(self.key, key, strength, self.value, mask, similarity, wants, sizes, self.group)

    def topk_read(
        self, query: torch.Tensor, k: int, *, scale: float | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k best rows of all N for each query, and their softmax read: the best of each shard, then the best of those.

        Args:
            query: "Q W", this rank's queries; Q may differ from rank to rank. k: how many rows, the same on all ranks.
            scale: factor of the scores ``query . row`` in the softmax (the choice does not depend on it), 1 / sqrt(W) if None.
            mask: bool "n", True = the row takes part.

        Returns:
            read "Q V", weights "Q k" (largest first), and index "Q k", global rows. Ties go to the lowest row; where fewer than k rows take
            part, the rest has weight 0 and index -1.
        """

        def plan() -> dict[str, float]:
            dims = TOPK(self.key, query, mask)
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST:
                fail(NAME, "k", f"an integer from 1 to {MOST}", k)
            factor = float(softmax_scale(NAME, scale, dims["W"]))
            wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, self.key, self.value))
            return {"k": k, "scale": factor, "gradients": wants, "Q": dims["Q"]}

        plans = agree(NAME, "query", ("k", "scale", "gradients"), ("Q",), plan, self.key.device, self.group)
        sizes = [int(p["Q"]) for p in plans]
        with no_autocast(self.key.device.type):
            query = query.to(self.key.dtype)
            with torch.no_grad():
                queries = gathered(query, sizes, self.group)
                index = self._best(*_local_top(queries, self.key, mask, k), len(plans))
            return _TopkRead.apply(self.key, query, self.value, index, self.offset, plans[self.rank]["scale"], sizes, self.group)

    def write(self, index: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None, *, accumulate: bool = False) -> None:
        """Writes rows in place, wherever they lie: each goes to the rank that owns it. Without a gradient.

        Args:
            index: int64 "M", global rows; M may differ from rank to rank. key: "M W". value: "M V" for a memory that has values.
            accumulate: add to the rows (a row named twice gets both) instead of replacing them (the last one named wins, ranks in order).
        """

        def plan() -> dict[str, float]:
            WRITE(self.key, index, key, value)
            check_flag(NAME, "accumulate", accumulate)
            if (value is None) != (self.value is None):
                fail(NAME, "value", "values" if value is None else "None: the memory has no values", type(value).__name__)
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < self.rows:
                fail(NAME, "index", f"rows 0 to N-1={self.rows - 1}", f"{int(index.min())} to {int(index.max())}", IndexError)
            return {"accumulate": accumulate, "M": index.shape[0]}

        agree(NAME, "index", ("accumulate",), ("M",), plan, self.key.device, self.group)
        ends = torch.tensor(self.sizes, device=index.device).cumsum(0)
        owner = torch.searchsorted(ends, index, right=True)
        order = torch.sort(owner, stable=True).indices
        counts = [int(n) for n in torch.bincount(owner, minlength=len(self.sizes))]
        arriving = [int(line[self.rank]) for line in tell([float(n) for n in counts], index.device, self.group)]
        own = self._routed(index[order], counts, arriving) - self.offset
        for rows, given in ((self.key, key), (self.value, value)):
            if rows is not None and given is not None:
                _put(rows, own, self._routed(given.detach()[order], counts, arriving), accumulate)

    def _best(self, scores: torch.Tensor, local: torch.Tensor, ranks: int) -> torch.Tensor:
        """The k best of all shards' candidates, global rows "all queries, k": -1 where there are no more."""
        counts = [scores.shape[0]] * ranks
        found = [
            torch.cat(gathered(t, counts, self.group).chunk(ranks), 1) for t in (scores, (local + self.offset).masked_fill(local < 0, -1))
        ]
        k = scores.shape[1]
        # Candidates lie by rank and, in a rank, by score and row: a stable sort gives ties to the lowest row.
        order = torch.sort(found[0], dim=1, descending=True, stable=True).indices[:, :k]
        return found[1].gather(1, order)

    def _routed(self, rows: torch.Tensor, counts: list[int], arriving: list[int]) -> torch.Tensor:
        """Sends the first counts[0] rows to rank 0 and so on; returns what arrives, in rank order."""
        ranks = dist.get_process_group_ranks(self.group) if self.group is not None else list(range(len(counts)))
        outgoing, incoming = rows.contiguous().split(counts), [rows.new_empty(n, *rows.shape[1:]) for n in arriving]
        incoming[self.rank] = outgoing[self.rank]
        moves = [dist.P2POp(dist.isend, t, r, self.group) for i, (r, t) in enumerate(zip(ranks, outgoing)) if i != self.rank and t.numel()]
        moves += [dist.P2POp(dist.irecv, t, r, self.group) for i, (r, t) in enumerate(zip(ranks, incoming)) if i != self.rank and t.numel()]
        for work in dist.batch_isend_irecv(moves) if moves else []:
            work.wait()
        return torch.cat(incoming)


SHARD = Signature(NAME, key="n W", value="n V | None")
CONTENT = Signature(NAME, rows="n W", key="R W", strength="R", mask=("n | None", torch.bool))
TOPK = Signature(NAME, rows="n W", query="Q W", mask=("n | None", torch.bool))
WRITE = Signature(NAME, rows="n W", index=("M", torch.int64), key="M W", value="M V | None")


def _local_top(queries: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best own rows of each query: scores "Q k" and rows "Q k", best first, ties to the lowest row, -inf and -1 past the last."""
    _, _, found = topk_read(queries[None], key[None], key[None, :, :1], k, scale=1.0, mask=None if mask is None else mask[None])
    rows, wide = found[0], _wide(queries)
    if not key.shape[0]:
        return torch.full(rows.shape, -torch.inf, dtype=wide, device=key.device), rows
    scores = (key[rows.clamp(min=0)].to(wide) @ queries[..., None].to(wide)).squeeze(-1)
    return scores.masked_fill(rows < 0, -torch.inf), rows


def _put(rows: torch.Tensor, index: torch.Tensor, given: torch.Tensor, accumulate: bool) -> None:
    with torch.no_grad():
        if accumulate:
            rows.index_add_(0, index, given)
            return
        turn = torch.arange(index.shape[0], device=index.device)
        last = turn.new_full((rows.shape[0],), -1).scatter_reduce(0, index, turn, "amax")
        wins = last[index] == turn
        rows[index[wins]] = given[wins]


class _ContentRead(torch.autograd.Function):
    """Every shard reads for all queries, by attention, whose log-sum-exp merges the parts; with share w of a part in the union, what
    reaches its read is w dread, and its log-sum-exp w dread . (its read - read)."""

    @staticmethod
    def forward(
        ctx: Any, rows: Any, key: Any, strength: Any, value: Any, mask: Any, similarity: str, wants: bool, sizes: list[int], group: Any
    ) -> Any:
        wide, given = _wide(rows), (rows, gathered(key, sizes, group), gathered(strength, sizes, group), value)
        with torch.set_grad_enabled(wants):  # inference mode refuses to record
            leaves: list[Any] = [t if t is None else t.detach().to(wide).requires_grad_(wants) for t in given]
            part, lse = _part(leaves[0], leaves[1], leaves[2], leaves[3], mask, similarity)
        top = gathered(lse[None], [1] * len(sizes), group).amax(0)
        share = torch.exp(lse.detach() - top.masked_fill(top == -torch.inf, 0))
        total = summed(share, group)
        share = (share / total.masked_fill(total == 0, 1))[:, None]
        read = summed(share * part.detach(), group)
        ctx.save_for_backward(rows, key, strength, value)
        ctx.part, ctx.lse, ctx.leaves, ctx.share, ctx.read = part, lse, leaves, share, read
        ctx.sizes, ctx.group, ctx.dtypes = sizes, group, [None if t is None else t.dtype for t in given]
        return read.split(sizes)[dist.get_rank(group)].to(key.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, dread: Any) -> tuple[Any, ...]:
        found = _ContentRead.gradients(ctx, dread)
        return *first_order(NAME, found, (*ctx.saved_tensors, dread)), None, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def gradients(ctx: Any, dread: Any) -> tuple[Any, ...]:
        dread = ctx.share * gathered(dread, ctx.sizes, ctx.group).to(ctx.read.dtype)
        upstream = dread, (dread * (ctx.part.detach() - ctx.read)).sum(1)
        given = [t for t in ctx.leaves if t is not None]
        drows, dkeys, dstrengths, *dvalue = torch.autograd.grad((ctx.part, ctx.lse), given, upstream, retain_graph=True)
        mine = dist.get_rank(ctx.group)
        dkey, dstrength = (summed(t, ctx.group).split(ctx.sizes)[mine] for t in (dkeys, dstrengths))
        found = [t.to(kind) for t, kind in zip((drows, dkey, dstrength, *dvalue), ctx.dtypes)]
        return tuple(found) if dvalue else (*found, None)


def _part(rows: torch.Tensor, key: torch.Tensor, strength: torch.Tensor, value: Any, mask: Any, similarity: str) -> tuple[Any, Any]:
    """The read of these rows alone, "R V", and the log-sum-exp of their logits (l2: less what a query adds to all of them), "R"."""
    if mask is not None:  # what a masked row holds reaches nothing, nor the gradient of its norm
        rows = rows.masked_fill(~mask[:, None], 0)
    value, strength = rows if value is None else value, strength[:, None]
    if similarity == "cosine":
        key, rows = (t / (t.square().sum(1, keepdim=True) + EPS).sqrt() for t in (key, rows))
    if similarity == "l2":  # -|k - m|^2 = 2 k . m - |m|^2 - |k|^2
        key = torch.cat((2 * key, key.new_full((key.shape[0], 1), -1.0)), 1)
        rows = torch.cat((rows, rows.square().sum(1, keepdim=True)), 1)
    query, rows, value = (t[None, None] for t in (strength * key, rows, value))
    seen = None if mask is None else mask[None, None, None]
    read, lse = attention(query, rows, value, attn_mask=seen, scale=1.0, return_lse=True)
    return read[0, 0], lse[0, 0]


class _TopkRead(torch.autograd.Function):
    """Reads rows that are chosen: each rank weighs its own for all queries, sums over the ranks join them."""

    @staticmethod
    def forward(ctx: Any, rows: Any, query: Any, value: Any, index: Any, offset: int, scale: float, sizes: list[int], group: Any) -> Any:
        wide, mine = _wide(query), dist.get_rank(group)
        queries, own = gathered(query, sizes, group).to(wide), (index >= offset) & (index < offset + rows.shape[0])
        local, values = torch.where(own, index - offset, -1), rows if value is None else value
        scores = scale * (_chosen(rows, local).to(wide) * queries[:, None]).sum(-1)
        scores = summed(scores, group).masked_fill(index < 0, -torch.inf)  # a row lies on one rank: the others add 0
        nothing = (index < 0).all(1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0), 1).masked_fill(index < 0, 0)
        read = summed(weighted_bag(values.to(wide), local, weights), group)
        ctx.save_for_backward(rows, query, value, queries, local, weights)
        ctx.scale, ctx.sizes, ctx.group, ctx.dtype = scale, sizes, group, query.dtype
        found = tuple(t.split(sizes)[mine].clone() for t in (read.to(query.dtype), weights.to(query.dtype), index))
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    def backward(ctx: Any, dread: Any, dweights: Any, _: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint computes them again each time
        found = _TopkRead.gradients(ctx, saved, dread, dweights)
        return *first_order(NAME, found, (*saved[:3], dread, dweights)), None, None, None, None, None

    @staticmethod
    @torch.no_grad()
    def gradients(ctx: Any, saved: Any, dread: Any, dweights: Any) -> tuple[Any, ...]:
        rows, _, value, queries, local, weights = saved
        wide, values = weights.dtype, rows if value is None else value
        dread, dweights = (gathered(t, ctx.sizes, ctx.group).to(wide) for t in (dread, dweights))
        direct = ((_chosen(values, local).to(wide) * dread[:, None]).sum(-1) + dweights).masked_fill(local < 0, 0)
        dscores = ctx.scale * weights * (direct - summed((weights * direct).sum(1, keepdim=True), ctx.group))
        dscores = dscores.masked_fill(local < 0, 0)
        dquery = summed(weighted_bag(rows.to(wide), local, dscores), ctx.group).split(ctx.sizes)[dist.get_rank(ctx.group)]
        drows, dvalues = (_spread(t, local, x, y) for t, x, y in ((rows, dscores, queries), (values, weights, dread)))
        dvalue = None if value is None else dvalues.to(value.dtype)
        drows = drows + dvalues if value is None else drows
        return drows.to(rows.dtype), dquery.to(ctx.dtype), dvalue


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chosen(rows: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The rows "Q k W" of an index, 0 where it is -1."""
    if rows.shape[0] == 0:
        return rows.new_zeros(*local.shape, rows.shape[1])
    return rows.detach()[local.clamp(min=0)].masked_fill((local < 0)[..., None], 0)


def _spread(rows: torch.Tensor, local: torch.Tensor, numbers: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """What each row is given: the sum of number times vector over the places that name it; the gradient of a weighted bag."""
    table = rows.new_zeros(rows.shape, dtype=numbers.dtype).requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(weighted_bag(table, local, numbers), table, vectors)[0]
