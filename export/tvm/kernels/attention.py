"""Attention over a ring of cached keys and the new ones, and the write that follows it, as one kernel.

Only keys that a token sees are visited: a local layer's cost does not grow with the text, and a token of an image goes
on to the image's end. The cached part and the new part are walked in blocks, with a running maximum and sum (Rabe and
Staats, arXiv:2112.05682), so memory is one block's scores. The new keys and values are written into the caches in place
once every token has attended. In encoders, where every token sees every other, many queries share a block of keys.

Axes: M new tokens, N query heads, K key heads, R = N / K, S slots, H numbers of a head.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from transom.export.tvm.kernels.arithmetic import exponential, hyperbolic_tangent, lane_sum
from transom.export.tvm.kernels.tile import Tile, divisor, part
from transom.graphs.ops import Mask

BLOCK = 64
"""Keys whose scores are held at once."""

QUERIES = 128
"""Queries of an encoder that share a block of keys once it is laid out for them."""

EMPTY = -1e30
"""Score of a key that is not there: its exponential is zero, and it has no NaNs."""


def cached(buffer: Any, head: Any, index: Any, column: Any) -> Any:
    """A number of a cache [1, K, S, H]; `index` may be up to one round of the ring too large."""
    slots = buffer.shape[2]
    return buffer[0, head, T.if_then_else(index >= slots, index - slots, index), column]


def fresh(h: int) -> Any:
    """Reads numbers of new keys or values [M, K * H]."""
    return lambda buffer, head, index, column: buffer[index, head * h + column]


def group_itself(group: Any) -> Any:
    """Place of a group's state where there is one of every group."""
    return group


@T.inline
def soften(scores, best, top, total, shift, groups, place, lanes):  # type: ignore[no-untyped-def]
    """Scores of a block become weights; `shift` is what the sums before it are to be multiplied by."""
    for group in T.unroll(groups):
        for lane in T.vectorized(lanes):
            best[group, lane] = scores[group, lane]
        for step in T.serial(BLOCK // lanes):
            for lane in T.vectorized(lanes):
                best[group, lane] = T.max(best[group, lane], scores[group, step * lanes + lane])
        shift[group] = top[place(group)]
        for lane in T.unroll(lanes):
            top[place(group)] = T.max(top[place(group)], best[group, lane])
        shift[group] = exponential(shift[group] - top[place(group)])
        for lane in T.vectorized(lanes):
            best[group, lane] = T.float32(0)
        for step in T.serial(BLOCK // lanes):
            for lane in T.vectorized(lanes):
                scores[group, step * lanes + lane] = exponential(scores[group, step * lanes + lane] - top[place(group)])
                best[group, lane] = best[group, lane] + scores[group, step * lanes + lane]
        total[place(group)] = total[place(group)] * shift[group] + lane_sum(best, group, lanes)


@T.inline
def visit(  # type: ignore[no-untyped-def]
    number, Q, K, V, row, head, first, count, rule, scores, top, total, out, groups, h, lanes, strip, keys
):
    """Attend over `count` keys from `first` on, as far apart as the mask says; `number` reads K and V."""
    shift = T.alloc_buffer((groups,), "float32", scope="local")
    best = T.alloc_buffer((groups, lanes), "float32", scope="local")
    for block in T.serial((count + T.int64(BLOCK - 1)) // T.int64(BLOCK)):
        for group in T.unroll(groups):
            for step in T.unroll(BLOCK // lanes):
                for lane in T.vectorized(lanes):
                    scores[group, step * lanes + lane] = T.float32(EMPTY)
        for quad in T.serial((T.min(count - block * BLOCK, T.int64(BLOCK)) + T.int64(keys - 1)) // T.int64(keys)):
            products = T.alloc_buffer((groups * keys, lanes), "float32", scope="local")
            for item in T.unroll(groups * keys):
                for lane in T.vectorized(lanes):
                    products[item, lane] = T.float32(0)
            for step in T.serial(h // lanes):
                for group in T.unroll(groups):
                    for key in T.unroll(keys):
                        for lane in T.vectorized(lanes):
                            products[group * keys + key, lane] = products[group * keys + key, lane] + Q[
                                row, (head * groups + group) * h + step * lanes + lane
                            ] * number(
                                K,
                                head,
                                first + rule.apart(T.min(block * BLOCK + quad * keys + key, count - 1)),
                                step * lanes + lane,
                            )
            for group in T.unroll(groups):
                for key in T.unroll(keys):
                    if block * BLOCK + quad * keys + key < count:
                        scores[group, quad * keys + key] = rule.score(lane_sum(products, group * keys + key, lanes))
        soften(scores, best, top, total, shift, groups, group_itself, lanes)
        for wide in T.serial(h // (strip * lanes)):
            sums = T.alloc_buffer((groups * strip, lanes), "float32", scope="local")
            for group in T.unroll(groups):
                for item in T.unroll(strip):
                    for lane in T.vectorized(lanes):
                        sums[group * strip + item, lane] = (
                            out[group, (wide * strip + item) * lanes + lane] * shift[group]
                        )
            for key in T.serial(T.min(count - block * BLOCK, T.int64(BLOCK))):
                for group in T.unroll(groups):
                    for item in T.unroll(strip):
                        for lane in T.vectorized(lanes):
                            sums[group * strip + item, lane] = sums[group * strip + item, lane] + scores[
                                group, key
                            ] * number(
                                V, head, first + rule.apart(block * BLOCK + key), (wide * strip + item) * lanes + lane
                            )
            for group in T.unroll(groups):
                for item in T.unroll(strip):
                    for lane in T.vectorized(lanes):
                        out[group, (wide * strip + item) * lanes + lane] = sums[group * strip + item, lane]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What a token sees, and how keys score.

    Attributes:
        mask: Which of the earlier keys a token sees; its reach is at most S.
        scale: Factor of the scores.
        softcap: Bound on the scores; 0 for none.
        images: Whether the last position that each token sees is an input.
        sinks: Whether scores of every head that have no value are an input.
    """

    mask: Mask
    scale: float
    softcap: float = 0.0
    images: bool = False
    sinks: bool = False

    def first(self, position: Any) -> Any:
        """Position of the first key that a token sees."""
        oldest = T.max(position - T.int64(self.mask.window or 2**62) + 1, T.int64(0))
        if self.mask.segment:
            oldest = T.max(oldest, position - T.truncmod(position, T.int64(self.mask.segment)))
        return self.aligned(oldest, position)

    def aligned(self, oldest: Any, position: Any) -> Any:
        """The first position from `oldest` on that is whole steps before a token's."""
        step = self.mask.dilation
        return oldest if step == 1 else oldest + T.truncmod(position - oldest, T.int64(step))

    def apart(self, index: Any) -> Any:
        """How far behind the first key the one with an index stands."""
        return index if self.mask.dilation == 1 else index * T.int64(self.mask.dilation)

    def steps(self, distance: Any) -> Any:
        """How many keys a token sees over a distance, from the first one on; none if it is negative."""
        step = self.mask.dilation
        return distance if step == 1 else T.truncdiv(T.max(distance, T.int64(0)) + T.int64(step - 1), T.int64(step))

    def score(self, product: Any) -> Any:
        """The score of a product of a query and a key."""
        if not self.softcap:
            return product * T.float32(self.scale)
        return hyperbolic_tangent(product * T.float32(self.scale / self.softcap)) * T.float32(self.softcap)

    def first_score(self, sinks: Any, head: Any) -> Any:
        """The largest score before any key."""
        return sinks[head] if self.sinks else T.float32(EMPTY)


def attend(heads: int, key_heads: int, h: int, rule: Rule, tile: Tile, *, single: bool = False) -> Any:
    """Queries [M, N * H], new keys and values [M, K * H], caches before them [1, K, S, H], start [] -> [M, N * H].

    Then, of images, the last positions that tokens see, [M]; then sinks, [N], or without any the queries once more.

    Args:
        heads: N.
        key_heads: K.
        h: H.
        rule: What tokens see.
        tile: Sizes of the innermost loops.
        single: Whether M is 1.
    """
    groups, lanes = heads // key_heads, divisor(h, tile.lanes)
    # Half of the registers accumulate, the rest is for what they are made of.
    keys = divisor(4, max(1, tile.registers // 2 // groups))
    strip = divisor(h // lanes, keys)
    new = fresh(h)
    loop = T.serial if single and key_heads == 1 else T.parallel

    def sinks_shape(m: Any) -> Any:
        return (heads,) if rule.sinks else (m, heads * h)

    @T.inline
    def attend_tasks(Q, K, V, K_cache, V_cache, start, sinks, output, newest, m, s):  # type: ignore[no-untyped-def]
        """Every token's queries of a key head; `newest` tells how many new tokens a token sees."""
        for task in loop(m * key_heads):
            # Threads get runs of tasks, and later tokens see more: early and late ones take turns.
            row = T.alloc_buffer((1,), "int64", scope="local")
            row[0] = task // key_heads
            row[0] = T.if_then_else(row[0] % 2 == 0, row[0] // 2, m - 1 - row[0] // 2)
            first = T.alloc_buffer((1,), "int64", scope="local")
            first[0] = rule.first(start[()] + row[0])
            # Among the new keys, counted from the first of them.
            first_new = T.alloc_buffer((1,), "int64", scope="local")
            first_new[0] = rule.aligned(T.max(first[0] - start[()], T.int64(0)), row[0])
            scores = T.alloc_buffer((groups, BLOCK), "float32", scope="local")
            top = T.alloc_buffer((groups,), "float32", scope="local")
            total = T.alloc_buffer((groups,), "float32", scope="local")
            out = T.alloc_buffer((groups, h), "float32", scope="local")
            for group in T.unroll(groups):
                # A sink has a weight of 1 until a key scores more.
                top[group] = rule.first_score(sinks, task % key_heads * groups + group)
                total[group] = T.float32(float(rule.sinks))
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        out[group, step * lanes + lane] = T.float32(0)
            visit(
                cached,
                Q,
                K_cache,
                V_cache,
                row[0],
                task % key_heads,
                T.truncmod(first[0], s),
                rule.steps(start[()] - first[0]),
                rule,
                scores,
                top,
                total,
                out,
                groups,
                h,
                lanes,
                strip,
                keys,
            )
            visit(
                new,
                Q,
                K,
                V,
                row[0],
                task % key_heads,
                first_new[0],
                rule.steps(newest(row[0]) - first_new[0]),
                rule,
                scores,
                top,
                total,
                out,
                groups,
                h,
                lanes,
                strip,
                keys,
            )
            for group in T.unroll(groups):
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        output[row[0], (task % key_heads * groups + group) * h + step * lanes + lane] = (
                            out[group, step * lanes + lane] / total[group]
                        )

    if rule.images:

        @T.prim_func(private=True, s_tir=True)
        def attend_rows_of_images(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            kc: T.handle,
            vc: T.handle,
            p: T.handle,
            u: T.handle,
            x: T.handle,
            o: T.handle,
        ) -> None:
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            m = T.int64()
            s = T.int64()
            Q = T.match_buffer(q, (m, heads * h), "float32")
            K = T.match_buffer(k, (m, key_heads * h), "float32")
            V = T.match_buffer(v, (m, key_heads * h), "float32")
            K_cache = T.match_buffer(kc, (1, key_heads, s, h), "float32")
            V_cache = T.match_buffer(vc, (1, key_heads, s, h), "float32")
            start = T.match_buffer(p, (), "int64")
            until = T.match_buffer(u, (m,), "int64")
            sinks = T.match_buffer(x, sinks_shape(m), "float32")
            output = T.match_buffer(o, (m, heads * h), "float32")
            attend_tasks(
                Q, K, V, K_cache, V_cache, start, sinks, output, lambda row: T.min(until[row] - start[()] + 1, m), m, s
            )

        return attend_rows_of_images

    @T.prim_func(private=True, s_tir=True)
    def attend_rows(
        q: T.handle, k: T.handle, v: T.handle, kc: T.handle, vc: T.handle, p: T.handle, x: T.handle, o: T.handle
    ) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        s = T.int64()
        Q = T.match_buffer(q, (m, heads * h), "float32")
        K = T.match_buffer(k, (m, key_heads * h), "float32")
        V = T.match_buffer(v, (m, key_heads * h), "float32")
        K_cache = T.match_buffer(kc, (1, key_heads, s, h), "float32")
        V_cache = T.match_buffer(vc, (1, key_heads, s, h), "float32")
        start = T.match_buffer(p, (), "int64")
        sinks = T.match_buffer(x, sinks_shape(m), "float32")
        output = T.match_buffer(o, (m, heads * h), "float32")
        attend_tasks(Q, K, V, K_cache, V_cache, start, sinks, output, lambda row: row + 1, m, s)

    return attend_rows


def attend_fully(heads: int, key_heads: int, h: int, scale: float, tile: Tile) -> Any:
    """Queries [M, N * H], keys and values [S, K * H] -> [M, N * H]; every query sees every key.

    Args:
        heads: N.
        key_heads: K.
        h: H.
        scale: Factor of the scores.
        tile: Sizes of the innermost loops.
    """
    groups, rows, wide, narrow = heads // key_heads, tile.rows, tile.lanes, divisor(h, tile.lanes)
    vectors = divisor(BLOCK // wide, tile.vectors)
    strip = part(h // narrow, max(1, tile.registers * 3 // 4 // rows), 1)
    most = -(-QUERIES // rows) * rows

    @T.prim_func(private=True, s_tir=True)
    def attend_fully_rows(q: T.handle, k: T.handle, v: T.handle, o: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        s = T.int64()
        Q = T.match_buffer(q, (m, heads * h), "float32")
        K = T.match_buffer(k, (s, key_heads * h), "float32")
        V = T.match_buffer(v, (s, key_heads * h), "float32")
        output = T.match_buffer(o, (m, heads * h), "float32")
        for task in T.parallel(heads * ((m + QUERIES - 1) // QUERIES)):
            queries = T.alloc_buffer((most, h), "float32", scope="global")
            keys = T.alloc_buffer((h, BLOCK), "float32", scope="global")
            values = T.alloc_buffer((BLOCK, h), "float32", scope="global")
            out = T.alloc_buffer((most, h), "float32", scope="global")
            top = T.alloc_buffer((most,), "float32", scope="global")
            total = T.alloc_buffer((most,), "float32", scope="global")
            scores = T.alloc_buffer((rows, BLOCK), "float32", scope="local")
            shift = T.alloc_buffer((rows,), "float32", scope="local")
            best = T.alloc_buffer((rows, wide), "float32", scope="local")
            for row in T.serial(most):
                top[row] = T.float32(EMPTY)
                total[row] = T.float32(0)
                for step in T.serial(h // narrow):
                    for lane in T.vectorized(narrow):
                        # Rows beyond the last repeat it, and are not stored.
                        queries[row, step * narrow + lane] = Q[
                            T.min(task // heads * QUERIES + row, m - 1), task % heads * h + step * narrow + lane
                        ] * T.float32(scale)
                        out[row, step * narrow + lane] = T.float32(0)
            for block in T.serial((s + BLOCK - 1) // BLOCK):
                for key in T.serial(BLOCK):
                    for column in T.serial(h):
                        keys[column, key] = K[T.min(block * BLOCK + key, s - 1), task % heads // groups * h + column]
                    for step in T.serial(h // narrow):
                        for lane in T.vectorized(narrow):
                            values[key, step * narrow + lane] = V[
                                T.min(block * BLOCK + key, s - 1),
                                task % heads // groups * h + step * narrow + lane,
                            ]
                for piece in T.serial((T.min(m - task // heads * QUERIES, QUERIES) + rows - 1) // rows):
                    for panel in T.serial(BLOCK // (vectors * wide)):
                        products = T.alloc_buffer((rows * vectors, wide), "float32", scope="local")
                        for item in T.unroll(rows * vectors):
                            for lane in T.vectorized(wide):
                                products[item, lane] = T.float32(0)
                        for column in T.serial(h):
                            for row in T.unroll(rows):
                                for vector in T.unroll(vectors):
                                    for lane in T.vectorized(wide):
                                        products[row * vectors + vector, lane] = (
                                            products[row * vectors + vector, lane]
                                            + queries[piece * rows + row, column]
                                            * keys[column, (panel * vectors + vector) * wide + lane]
                                        )
                        for row in T.unroll(rows):
                            for vector in T.unroll(vectors):
                                for lane in T.vectorized(wide):
                                    scores[row, (panel * vectors + vector) * wide + lane] = products[
                                        row * vectors + vector, lane
                                    ]
                    if block * BLOCK + BLOCK > s:
                        for row in T.unroll(rows):
                            for key in T.serial(BLOCK):
                                if block * BLOCK + key >= s:
                                    scores[row, key] = T.float32(EMPTY)
                    soften(scores, best, top, total, shift, rows, lambda row, piece=piece: piece * rows + row, wide)
                    for slice in T.serial(h // (strip * narrow)):
                        sums = T.alloc_buffer((rows * strip, narrow), "float32", scope="local")
                        for row in T.unroll(rows):
                            for item in T.unroll(strip):
                                for lane in T.vectorized(narrow):
                                    sums[row * strip + item, lane] = (
                                        out[piece * rows + row, (slice * strip + item) * narrow + lane] * shift[row]
                                    )
                        for key in T.serial(BLOCK):
                            for row in T.unroll(rows):
                                for item in T.unroll(strip):
                                    for lane in T.vectorized(narrow):
                                        sums[row * strip + item, lane] = (
                                            sums[row * strip + item, lane]
                                            + scores[row, key] * values[key, (slice * strip + item) * narrow + lane]
                                        )
                        for row in T.unroll(rows):
                            for item in T.unroll(strip):
                                for lane in T.vectorized(narrow):
                                    out[piece * rows + row, (slice * strip + item) * narrow + lane] = sums[
                                        row * strip + item, lane
                                    ]
            for row in T.serial(T.min(m - task // heads * QUERIES, QUERIES)):
                for step in T.serial(h // narrow):
                    for lane in T.vectorized(narrow):
                        output[task // heads * QUERIES + row, task % heads * h + step * narrow + lane] = (
                            out[row, step * narrow + lane] / total[row]
                        )

    return attend_fully_rows


def write_cache(key_heads: int, h: int, tile: Tile) -> Any:
    """New keys or values [M, K * H] into a cache [1, K, S, H] in place, start []; of more than S, the last ones.

    Args:
        key_heads: K.
        h: H.
        tile: Sizes of the innermost loops.
    """
    lanes = divisor(h, tile.lanes)

    @T.prim_func(private=True, s_tir=True)
    def write_cache_rows(x: T.handle, c: T.handle, p: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        m = T.int64()
        s = T.int64()
        new = T.match_buffer(x, (m, key_heads * h), "float32")
        cache = T.match_buffer(c, (1, key_heads, s, h), "float32")
        start = T.match_buffer(p, (), "int64")
        for head in T.serial(key_heads):
            for item in T.serial(T.min(m, s)):
                for step in T.serial(h // lanes):
                    for lane in T.vectorized(lanes):
                        cache[0, head, T.truncmod(start[()] + m - 1 - item, s), step * lanes + lane] = new[
                            m - 1 - item, head * h + step * lanes + lane
                        ]

    return write_cache_rows
