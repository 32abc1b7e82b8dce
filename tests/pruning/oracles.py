"""The papers' selections, one sample at a time, in slow loops over float64.

A sample is `queries` [rows, heads, channels] (scaled), `keys` [columns, kv heads, channels] and
`sees` [rows, columns]. Query head h reads KV head h // (heads // kv heads).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def attention_row(
    queries: np.ndarray, keys: np.ndarray, sees: np.ndarray, row: int, head: int
) -> list[float]:
    """One row of one head's attention weights; zeros if the row sees nothing."""
    columns, kv_heads, _ = keys.shape
    kv = head // (queries.shape[1] // kv_heads)
    seen = [column for column in range(columns) if sees[row, column]]
    weights = [0.0] * columns
    if not seen:
        return weights
    logits = {
        column: sum(
            float(a) * float(b) for a, b in zip(queries[row, head], keys[column, kv], strict=True)
        )
        for column in seen
    }
    highest = max(logits.values())
    total = sum(math.exp(logit - highest) for logit in logits.values())
    for column in seen:
        weights[column] = math.exp(logits[column] - highest) / total
    return weights


def seen_columns(sees: np.ndarray) -> list[int]:
    """Columns that hold a token some row sees: the N of the papers."""
    return [column for column in range(sees.shape[1]) if any(sees[:, column])]


@dataclasses.dataclass
class Trimmed:
    kept: list[int]
    union: int
    overflow: int
    mass: float


def trimmed_llama(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    capacity: int | None,
    per_head: int | None = None,
    k_ratio: str | None = None,
) -> Trimmed:
    """arXiv 2504.00557: per head the k most attended columns, their union, cut at `capacity`.

    `k_ratio` is decimal text, so that ⌈k_ratio·N⌉ is exact; without either, every head asks for
    all columns.
    """
    rows, heads, _ = queries.shape
    real = seen_columns(sees)
    received = [[0.0] * sees.shape[1] for _ in range(heads)]
    for head in range(heads):
        for row in range(rows):
            for column, weight in enumerate(attention_row(queries, keys, sees, row, head)):
                received[head][column] += weight

    k = len(real)
    if per_head is not None:
        k = min(per_head, len(real))
    elif k_ratio is not None:
        k = math.ceil(Fraction(k_ratio) * len(real))

    union: set[int] = set()
    best_rank = {column: len(real) for column in real}
    for head in range(heads):
        ranking = sorted(real, key=lambda column: (-received[head][column], column))
        union.update(ranking[:k])
        for place, column in enumerate(ranking):
            best_rank[column] = min(best_rank[column], place)

    total = {column: sum(received[head][column] for head in range(heads)) for column in real}
    wish = sorted(union, key=lambda column: (best_rank[column], -total[column], column))
    kept = sorted(wish if capacity is None else wish[:capacity])
    everything = sum(total.values())
    mass = sum(total[column] for column in kept) / everything if everything else 0.0
    if per_head is None and k_ratio is None:  # nobody asks for a number: nothing overflows
        return Trimmed(kept, len(kept), 0, mass)
    return Trimmed(kept, len(union), len(union) - len(kept), mass)


def fastv(queries: np.ndarray, keys: np.ndarray, sees: np.ndarray, *, keep: int) -> list[int]:
    """arXiv 2403.06764, released code: head-mean of the last row, here the last that sees."""
    seeing = [row for row in range(len(sees)) if any(sees[row])]
    if not seeing:
        return []
    heads = queries.shape[1]
    score = [0.0] * sees.shape[1]
    for head in range(heads):
        for column, weight in enumerate(attention_row(queries, keys, sees, seeing[-1], head)):
            score[column] += weight / heads
    ranking = sorted(seen_columns(sees), key=lambda column: (-score[column], column))
    return sorted(ranking[:keep])


def k_norm(keys: np.ndarray, sees: np.ndarray, *, keep: int) -> list[int]:
    """arXiv 2406.11430 with one set for all heads: the smallest mean key norms."""
    norms = {}
    for column in seen_columns(sees):
        by_head = [math.sqrt(sum(float(x) ** 2 for x in key)) for key in keys[column]]
        norms[column] = sum(by_head) / len(by_head)
    return sorted(sorted(norms, key=lambda column: (norms[column], column))[:keep])


def best(score: list[float], keep: int, among: list[int] | None = None) -> list[int]:
    """The `keep` highest scores, in the order of their numbers; of equals the lower number."""
    numbers = list(range(len(score))) if among is None else among
    return sorted(sorted(numbers, key=lambda number: (-score[number], number))[:keep])


def all_rows(queries: np.ndarray, keys: np.ndarray, head: int) -> np.ndarray:
    """One head's attention weights [rows, columns], every row seeing every column."""
    sees = np.ones((len(queries), len(keys)), bool)
    rows = [attention_row(queries, keys, sees, row, head) for row in range(len(queries))]
    return np.asarray(rows)


def catp_votes(queries: np.ndarray, keys: np.ndarray, image: np.ndarray | None) -> list[float]:
    """arXiv 2404.08567, one layer: points by rank in each head and image token's column.

    The least attended query of a column gets 0 points, the most attended as many as there are
    others. `image` weighs the columns.
    """
    points = [0.0] * len(queries)
    for head in range(queries.shape[1]):
        weights = all_rows(queries, keys, head)
        for column in range(weights.shape[1]):
            ranks = np.argsort(np.argsort(weights[:, column], kind="stable"), kind="stable")
            for number, rank in enumerate(ranks):
                points[number] += float(rank) * (1.0 if image is None else float(image[column]))
    return points


def received(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Attention that each column receives, over all heads and rows."""
    return sum(all_rows(queries, keys, head).sum(axis=0) for head in range(queries.shape[1]))


def l2(tokens: np.ndarray) -> list[float]:
    """The length of each token."""
    return [math.sqrt(sum(float(x) ** 2 for x in token)) for token in tokens]


def parts(size: int, number: int) -> list[list[int]]:
    """Places cut into even parts."""
    found: list[list[int]] = [[] for _ in range(number)]
    for place in range(size):
        found[math.floor(Fraction(place, size) * number)].append(place)
    return found


def pool_cells(
    rows: int, columns: int, others: int, there: Sequence[int], budget: int
) -> list[list[int]]:
    """The groups that tiles are cut into, from loops over places."""
    per_tile = others + rows * columns
    found = []
    budget = min(budget, len(there) * per_tile)
    shares = [len(part) for part in parts(budget, len(there))] if there else []
    # the remainder goes to the last tiles
    shares = sorted(shares)
    ends = [(place + 1) * budget // len(there) for place in range(len(there))]
    own = [end - start for start, end in itertools.pairwise([0, *ends])]
    assert sorted(own) == shares
    for tile, share in zip(there, own, strict=True):
        begin = tile * per_tile
        if share == per_tile:
            found += [[begin + place] for place in range(per_tile)]
            continue
        share = min(share, rows * columns)
        if not share:
            continue
        bands = min(math.ceil(math.sqrt(Fraction(share * rows, columns))), share)
        cuts = [band * share // bands for band in range(bands + 1)]
        for (left, right), lines in zip(itertools.pairwise(cuts), parts(rows, bands), strict=True):
            for some in parts(columns, right - left):
                cell = [row * columns + column for row in lines for column in some]
                found.append([begin + others + patch for patch in cell])
    return found


def fastv_of_all_rows(
    queries: np.ndarray, keys: np.ndarray, sees: np.ndarray, *, keep: int
) -> list[int]:
    """arXiv 2403.06764, the paper's text: attention received from all rows."""
    rows, heads, _ = queries.shape
    score = [0.0] * sees.shape[1]
    for row in range(rows):
        for head in range(heads):
            for column, weight in enumerate(attention_row(queries, keys, sees, row, head)):
                score[column] += weight
    ranking = sorted(seen_columns(sees), key=lambda column: (-score[column], column))
    return sorted(ranking[:keep])


def k_norm_of_head(keys: np.ndarray, visual: Sequence[int], *, head: int, keep: int) -> list[int]:
    """arXiv 2406.11430: in a head the visual tokens with the shortest keys."""
    norms = {n: math.sqrt(sum(float(x) ** 2 for x in keys[n, head])) for n in visual}
    return sorted(sorted(visual, key=lambda n: (norms[n], n))[:keep])


def csp(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    head: int,
    visual: Sequence[int],
    text: Sequence[int],
    rows_of_visual: int,
    keep: int,
    ratio: Fraction = Fraction(1, 2),
) -> list[int]:
    """arXiv 2412.04652 for one key-value head: what it keeps of visual tokens and text, as many as
    `keep` visual tokens and the text are. The first `rows_of_visual` rows are of visual tokens.
    """
    group = queries.shape[1] // keys.shape[1]
    seeing = [row for row in range(len(sees)) if any(sees[row])]
    observed = max(len(seeing) // 10, 1)
    intra, inter = dict.fromkeys((*visual, *text), 0.0), dict.fromkeys((*visual, *text), 0.0)
    for row in seeing[-observed:]:
        for query_head in range(head * group, (head + 1) * group):
            logits = {
                n: sum(
                    float(a) * float(b)
                    for a, b in zip(queries[row, query_head], keys[n, head], strict=True)
                )
                for n in intra
                if sees[row, n]
            }
            total = 1 + sum(math.exp(logit) for logit in logits.values())
            for n, logit in logits.items():
                alike = (row < rows_of_visual) == (n in visual)
                (intra if alike else inter)[n] += math.exp(logit) / total / group
    recent = [*visual, *text][-observed:] if text else []
    left = keep + len(text) - len(recent)
    by_inter = math.floor(left * ratio)
    free = [n for n in intra if n not in recent]
    own = sorted(free, key=lambda n: (-intra[n], -inter[n], n))[: left - by_inter]
    free = [n for n in free if n not in own]
    other = sorted(free, key=lambda n: (-inter[n], -intra[n], n))[:by_inter]
    return sorted([*recent, *own, *other])


def elastic_cache(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    visual: Sequence[int],
    keep: int,
    per_tile: int | None = None,
) -> dict[int, list[int]]:
    """arXiv 2407.18121: the tokens that are merged, by the anchor that they are merged into."""
    rows, heads, _ = queries.shape
    received = dict.fromkeys(visual, 0.0)
    for row in range(rows):
        for head in range(heads):
            weights = attention_row(queries, keys, sees, row, head)
            for n in visual:
                received[n] += weights[n] / heads
    anchors = sorted(sorted(visual, key=lambda n: (-received[n], n))[:keep])
    buckets: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for n in visual:
        own = [a for a in anchors if per_tile is None or a // per_tile == n // per_tile]
        if own:
            buckets[min(own, key=lambda a: (abs(a - n), a))].append(n)
    return buckets


def think(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    head: int,
    number: int,
    window: int,
) -> list[int]:
    """arXiv 2407.21018 for one key-value head: the channels with the largest product of norms, of
    the group's last `window` queries that see anything and of all `keys`.
    """
    group = queries.shape[1] // keys.shape[1]
    seeing = [row for row in range(len(sees)) if any(sees[row])][-window:]
    score = []
    for channel in range(queries.shape[2]):
        of_queries = sum(
            float(queries[row, query_head, channel]) ** 2
            for row in seeing
            for query_head in range(head * group, (head + 1) * group)
        )
        score.append(of_queries * sum(float(key[head, channel]) ** 2 for key in keys))
    return sorted(sorted(range(len(score)), key=lambda c: (-score[c], c))[:number])


def zipvl(
    queries: np.ndarray,
    keys: np.ndarray,
    sees: np.ndarray,
    *,
    visual: Sequence[int],
    tau: float,
    room: int,
) -> tuple[int, list[int]]:
    """arXiv 2410.08584, version 2, where all rows are probes: how many visual tokens are wanted,
    and which stay in so much room.
    """
    received = dict.fromkeys(visual, 0.0)
    for row in range(len(queries)):
        for head in range(queries.shape[1]):
            weights = attention_row(queries, keys, sees, row, head)
            for n in visual:
                received[n] += weights[n]
    highest = sorted(received.values(), reverse=True)
    wanted = 1
    while wanted < len(visual) and sum(highest[:wanted]) < tau * sum(highest):
        wanted += 1
    score = {n: received[n] / max(1, sum(map(bool, sees[:, n]))) for n in visual}
    return wanted, sorted(sorted(visual, key=lambda n: (-score[n], n))[: min(wanted, room)])
