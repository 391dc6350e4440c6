"""Attention over a sequence that lies in shards on several processes (context parallelism)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from memkernels._checks import FLOATS, Signature, check_flag, fail
from memkernels._compat import autocast_enabled, no_autocast
from memkernels.distributed._collectives import check_group, check_held, speaking, tell
from memkernels.distributed._first_order import first_order
from memkernels.ops._attention import softmax_scale
from memkernels.ops._attention_parts import Part, part_backward, part_forward

__all__ = ["ring_attention"]


def ring_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` of one sequence whose shards lie on the ranks of a process group, in rank order.

    Every rank keeps its queries; keys and values travel around the ring, the next shard while this one is attended, and the parts are
    merged exactly. All ranks of the group must make this call, and its backward, together.

    Formula:
        ``out = attention(cat(query), cat(key), cat(value))``, cut where the queries were; cat joins the shards of all ranks.

    Args:
        query: "B NH Q D", this rank's queries; float64, float32, bfloat16 or float16. Q may differ from rank to rank, and be 0.
        key: "B NHk K D", this rank's keys, NHk a divisor of NH. K may differ from rank to rank, and be 0.
        value: "B NHk K V".
        group: the process group; None is the default group. Any backend that can send these tensors (gloo, nccl).
        is_causal: a query sees the keys up to its own place, places counted over the whole sequence.
        scale: factor of the scores, default 1 / sqrt(D).
        return_lse: also return the log-sum-exp.

    Returns:
        out: "B NH Q V" of this rank's queries, contiguous; 0 where a query sees no key. With ``return_lse``: (out, lse "B NH Q"),
        float32 (float64 for float64), -inf where a query sees no key.

    Gradients:
        To ``query``, ``key`` and ``value``, also through ``lse``, first order. Backward runs the ring again with shards and their
        float32 gradients, which end at their owner: on each rank the gradient is that of the sum of all ranks' losses.

    Numerics:
        Parts and gradients are merged in float32 (float64 for float64), own shard first, then against the ring: the same bits in every
        run. Beyond inputs and outputs a rank holds two shards of keys and values and, in backward, of their gradients; parts are computed
        again in backward, but for the own.

    Raises:
        RuntimeError: no process group, or another rank refused its arguments. ValueError, TypeError: on all ranks, if a size that must be
        equal, a dtype, an option, or whether gradients are needed differs between ranks.

    Source:
        Liu, Zaharia and Abbeel, Ring Attention with Blockwise Transformers (2023), section 3.
    """
    out, lse = _on_all_ranks(query, key, value, group, is_causal, scale, return_lse)
    return (out, lse) if return_lse else out


@torch.compiler.disable  # communication, and sizes that are learnt from other ranks
def _on_all_ranks(query: Any, key: Any, value: Any, group: Any, is_causal: Any, scale: Any, return_lse: Any) -> Any:
    """(out, lse), after all ranks have agreed on what is to be done."""
    check_group("ring_attention", group)
    plan, problem = None, None
    try:
        plan = _own_plan(query, key, value, is_causal, scale, return_lse)
        scale = plan["scale"]
    except Exception as error:  # whatever it is, the other ranks must hear of it
        problem = error
    shards = _exchange(plan, problem, query, group)
    query, key, value = (t.to(_travelling(query)) for t in (query, key, value))
    return _RingAttention.apply(query, key, value, shards, is_causal, scale, group)


SIGNATURE = Signature("ring_attention", query="B NH Q D", key="B NHk K D", value="B NHk K V")
# What ranks tell each other; the first ones must be equal.
EQUAL = ("B", "NH", "NHk", "D", "V", "dtype", "is_causal", "scale")
FIELDS = (*EQUAL, "gradients", "Q", "K", "refused")


class Shards(NamedTuple):
    """Sizes of all ranks in rank order, and the own rank."""

    queries: list[int]
    keys: list[int]
    rank: int

    def reach(self, owner: int, is_causal: bool) -> tuple[int, int | None]:
        """(the first own query that sees a key of this shard, how many keys past the first it sees; None: all of them see all)."""
        queries, keys = self.queries[self.rank], self.keys[owner]
        if keys == 0:
            return queries, None
        right = sum(self.queries[: self.rank]) - sum(self.keys[:owner])
        if not is_causal or right >= keys - 1:
            return 0, None
        return min(max(-right, 0), queries), max(right, 0)


def _travelling(query: torch.Tensor) -> torch.dtype:
    """The dtype of what is sent: under autocast, which one rank may have turned on alone, the lower one."""
    if query.dtype == torch.float64 or not autocast_enabled(query.device.type):
        return query.dtype
    return torch.get_autocast_dtype(query.device.type)


def _own_plan(query: Any, key: Any, value: Any, is_causal: Any, scale: Any, return_lse: Any) -> dict[str, float]:
    """What this rank tells the others; raises what `attention` would."""
    dims = SIGNATURE(query, key, value)
    heads, shared = dims["NH"], dims["NHk"]
    if heads != shared and (shared == 0 or heads % shared):
        fail("ring_attention", "key", f"a divisor of {heads} heads", f"shape {tuple(key.shape)}")
    check_flag("ring_attention", "is_causal", is_causal)
    check_flag("ring_attention", "return_lse", return_lse)
    check_held("ring_attention", query=query)
    scale = float(softmax_scale("ring_attention", scale, dims["D"]))
    dtype = FLOATS.index(_travelling(query))
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return {**dims, "dtype": dtype, "is_causal": is_causal, "scale": scale, "gradients": gradients, "refused": False}


def _exchange(plan: dict[str, float] | None, problem: Exception | None, query: Any, group: Any) -> Shards:
    """Every rank learns the sizes of all, and raises if one of them cannot take part, so that none is left waiting."""
    device = speaking(query.device if isinstance(query, torch.Tensor) else "cpu")
    lines = tell([1.0 if plan is None else plan[field] for field in FIELDS], device, group)
    plans = [dict(zip(FIELDS, line, strict=True)) for line in lines]
    if problem is not None:
        raise problem
    for rank, other in enumerate(plans):
        if other["refused"]:
            fail("ring_attention", f"rank {rank}", "arguments like here", "some that it refused", RuntimeError)
    for field in (*EQUAL, "gradients"):
        values = [p[field] for p in plans]
        if len(set(values)) > 1:
            shown = [str(FLOATS[int(v)]).removeprefix("torch.") if field == "dtype" else v if field == "scale" else int(v) for v in values]
            what = "a call that needs gradients on all ranks or on none" if field == "gradients" else f"the same {field} on all ranks"
            fail("ring_attention", "query, key, value", what, ", ".join(map(str, shown)), TypeError if field == "dtype" else ValueError)
    return Shards([int(p["Q"]) for p in plans], [int(p["K"]) for p in plans], dist.get_rank(group))


class _Ring:
    """One way around the ring: buffers go to the next rank and come from the one before."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor, shards: Shards, group: Any):
        self.shards, self.group, self.size = shards, group, len(shards.keys)
        self.batch, self.heads, _, self.width = key.shape
        self.value_width = value.shape[3]
        ranks = range(self.size) if group is None else dist.get_process_group_ranks(group)
        self.after, self.before = ranks[(shards.rank + 1) % self.size], ranks[(shards.rank - 1) % self.size]

    def owner(self, step: int) -> int:
        """Whose shard this rank holds at a step."""
        return (self.shards.rank - step) % self.size

    def pass_on(self, buffer: torch.Tensor, step: int) -> tuple[torch.Tensor, list[Any]]:
        """Sends what belongs to the shard of this step, receives the next step's; neither may be used before the works are waited for."""
        rows = self.batch * self.heads * self.shards.keys[self.owner(step + 1)]
        received = buffer.new_empty(rows * (self.width + self.value_width))
        moves = [dist.P2POp(dist.isend, buffer, self.after, self.group)] if buffer.numel() else []
        moves += [dist.P2POp(dist.irecv, received, self.before, self.group)] if received.numel() else []
        return received, dist.batch_isend_irecv(moves) if moves else []

    def cut(self, buffer: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values (or their gradients) in a buffer of `join`."""
        keys = self.shards.keys[self.owner(step)]
        key, value = buffer.split([self.batch * self.heads * keys * width for width in (self.width, self.value_width)])
        return key.view(self.batch, self.heads, keys, self.width), value.view(self.batch, self.heads, keys, self.value_width)

    def walk(self, key: torch.Tensor, value: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(step, key, value) of all shards, the own first; the next one travels while this one is worked on."""
        buffer = join(key, value) if self.size > 1 else key
        for step in range(self.size):
            arriving, works = self.pass_on(buffer, step) if step + 1 < self.size else (buffer, [])
            yield step, key, value
            wait(works)
            if step + 1 < self.size:
                buffer = arriving
                key, value = self.cut(buffer, step + 1)


def join(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Both in one buffer: a step is one message."""
    return torch.cat((key.reshape(-1), value.reshape(-1)))


def wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


class _Merged:
    """The union of parts: sums of exp(score - top) value, the maximum top and the sum of exp(score - top), in float32 or float64."""

    def __init__(self, query: torch.Tensor, value_width: int):
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.sums = query.new_zeros(*query.shape[:3], value_width, dtype=wide)
        self.top = query.new_full(query.shape[:3], -torch.inf, dtype=wide)
        self.total = torch.zeros_like(self.top)

    def add(self, part: Part, first: int) -> None:
        """One more part, of the queries from `first` on."""
        sums, top, total = self.sums[:, :, first:], self.top[:, :, first:], self.total[:, :, first:]
        part_top, part_total = part.stats.unbind(-1)
        now = torch.maximum(top, part_top)
        base = now.masked_fill(now == -torch.inf, 0)
        shrink, grow = torch.exp(top - base), torch.exp(part_top - base) * part_total
        sums.mul_(shrink[..., None]).addcmul_(part.out, grow[..., None])
        total.mul_(shrink).add_(grow)
        top.copy_(now)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, shards: Shards, is_causal: bool, scale: float, group: Any) -> Any:
        merged, kept = _Merged(query, value.shape[3]), None  # the own part is kept for backward, the others are computed again
        with no_autocast(query.device.type):
            for step, keys, values in _Ring(key, value, shards, group).walk(key, value):
                first, right = shards.reach((shards.rank - step) % len(shards.keys), is_causal)
                if first < query.shape[2]:
                    part = part_forward(query[:, :, first:], keys, values, **_options(query, keys, scale, right))
                    merged.add(part, first)
                    kept = part if step == 0 else kept
        out = (merged.sums / merged.total.masked_fill(merged.total == 0, 1)[..., None]).to(query.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, out, merged.top, merged.total, *(kept or (None, None)))
        ctx.call = shards, is_causal, scale, group
        return out, merged.top + merged.total.log()

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx.call, saved, dout, dlse)
        return *first_order("ring_attention", found, (*saved[:3], dout, dlse)), None, None, None, None


def _gradients(call: tuple[Any, ...], saved: tuple[Any, ...], dout: Any, dlse: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward around the ring."""
    query, key, value, out, top, total, *kept = saved
    shards, is_causal, scale, group = call
    wide = top.dtype
    dout = (torch.zeros_like(out) if dout is None else dout).to(wide)
    delta = (dout * out).sum(-1) - (0 if dlse is None else dlse)
    dquery, ring = torch.zeros_like(query, dtype=wide), _Ring(key, value, shards, group)
    with no_autocast(query.device.type):
        arriving, works = key.new_empty(0), list[Any]()
        for step, keys, values in ring.walk(key, value):
            first, right = shards.reach(ring.owner(step), is_causal)
            dkey, dvalue = torch.zeros_like(keys), torch.zeros_like(values)
            if first < query.shape[2]:
                queries, options = query[:, :, first:], _options(query, keys, scale, right)
                part = Part(*kept) if step == 0 else part_forward(queries, keys, values, **options)
                upstream = _part_upstream(part, *(t[:, :, first:] for t in (dout, delta, top, total)))
                dqueries, dkey, dvalue = part_backward(*upstream, queries, keys, values, part, **options)
                dquery[:, :, first:] += dqueries
            mine = join(dkey, dvalue).to(wide)
            wait(works)
            mine = mine if step == 0 else arriving.add_(mine)
            arriving, works = ring.pass_on(mine, step) if ring.size > 1 else (mine, [])
        wait(works)
    dkey, dvalue = ring.cut(arriving, 0)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype)


def _part_upstream(part: Part, dout: Any, delta: Any, top: Any, total: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What reaches the out and the log-sum-exp of a part through the union: with weight w = exp(its lse - lse), w dout and
    w (dout . its out - delta), delta = dout . out - dlse. The part's own backward then gives gradients by the statistics of the union."""
    part_top, part_total = part.stats.unbind(-1)
    blind = part_total == 0
    weight = torch.exp((part_top - top).masked_fill(blind, -torch.inf)) * part_total / total.masked_fill(blind, 1)
    dlse = weight * ((dout * part.out).sum(-1) - delta).masked_fill(blind, 0)
    return (weight[..., None] * dout.masked_fill(blind[..., None], 0)).to(part.out.dtype), dlse


def _options(query: torch.Tensor, key: torch.Tensor, scale: float, right: int | None) -> dict[str, Any]:
    """What `attention` is told of one part; a further option of it (a softcap, say) enters here."""
    window = None if right is None else (None, right)
    return dict(scale=scale, window=window, enable_gqa=query.shape[1] != key.shape[1])
