"""LSH attention token by token, as the paper says it: the truth that the fast kernel is compared with.

Plain loops over rows, documents, heads, rounds and tokens; sorting by Python's `sorted`; one softmax a round, rounds
merged by their log-sum-exp. Differentiable by autograd; meant for float64 and for at most a few hundred tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention_zoo.attention.reformer import Reformer
from attention_zoo.contract import Tokens
from attention_zoo.ops.lsh.hashing import seeded_rotations


def reference(layer: Reformer, x: Tensor, tokens: Tokens, choices: Tensor | None = None) -> Tensor:
    """Hidden states [B, L, E] of an evaluation call; zeros at padding."""
    rows = [[torch.zeros_like(x[b, 0].nan_to_num()) for _ in range(x.shape[1])] for b in range(len(x))]
    for b in range(len(x)):
        valid = tokens.valid[b].tolist()
        documents = tokens.document[b].tolist()
        for document in sorted({d for d, good in zip(documents, valid) if good}):
            columns = [c for c in range(x.shape[1]) if valid[c] and documents[c] == document]
            here = torch.stack([x[b, c] for c in columns])
            given = None if choices is None else choices[b, :, :, columns, 0].tolist()
            length = max(len(columns), int(tokens.length[b, columns[-1]]))
            for c, hidden in zip(columns, _document(layer, here, given, slots(layer, len(columns), length))):
                rows[b][c] = hidden
    return torch.stack([torch.stack(row) for row in rows])


def slots(layer: Reformer, tokens: int, length: int) -> int:
    """Places to sort a document's tokens into."""
    if not layer.fill:
        return tokens
    while length % layer.fill:
        length += 1
    return length


def _document(layer: Reformer, x: Tensor, choices: list | None, places: int) -> Tensor:
    D = layer.head_width
    qk, v = layer.to_qk(x), layer.to_v(x)
    heads = []
    for h in range(layer.heads):
        mine = slice(h * D, (h + 1) * D)
        buckets = hash_document(layer, qk[:, mine].detach(), h, places) if choices is None else choices[h]
        heads.append(_attend(layer, qk[:, mine], v[:, mine], buckets, places))
    return layer.to_out(torch.cat(heads, -1))


def factors(layer: Reformer, length: int) -> list[int]:
    if layer.factors is not None:
        return list(layer.factors)
    count = 2
    while 2 * count <= 2 * length / layer.chunk:
        count *= 2
    if count <= layer.split_above:
        return [count]
    small = int(2 ** (int(math.log2(count)) // 2))
    return [small, count // small]


def hash_document(layer: Reformer, q: Tensor, head: int, places: int | None = None) -> list[list[int]]:
    """Bucket of each token, a list for each round."""
    counts = factors(layer, len(q) if places is None else places)
    rotations = seeded_rotations(layer.seed, layer.heads, layer.rounds, layer.head_width, tuple(counts))
    found = []
    for r in range(layer.rounds):
        found.append([])
        for token in q:
            bucket, radix = 0, 1
            for count, rotation in zip(counts, rotations):
                y = (token.double() @ rotation[head, :, r]).tolist()
                both = [*y, *(-value for value in y)]
                assert len(both) == count
                bucket += radix * both.index(max(both))
                radix *= count
            found[r].append(bucket)
    return found


def windows(layer: Reformer, buckets: list[list[int]], places: int) -> list[list[list[tuple[int, int]]]]:
    """For each round and token, the (round, token) pairs that its window shows, before any mask."""
    n = len(buckets[0])
    chunks = []
    for r, row in enumerate(buckets):
        order = sorted(range(n), key=lambda i: (row[i], i))
        chunks.append([[(r, i) for i in order[s : s + layer.chunk]] for s in range(0, places, layer.chunk)])
    rings = [[chunk for one in chunks for chunk in one]] if layer.wrap == "reference" else chunks
    shown: list[list[list[tuple[int, int]]]] = [[[] for _ in range(n)] for _ in buckets]
    for ring in rings:
        for at, chunk in enumerate(ring):
            around = []
            for offset in range(-layer.look_back, layer.look_ahead + 1):
                if layer.fill:
                    around.append((at + offset) % len(ring) if abs(offset) < len(ring) else at)
                elif (at + offset) % len(ring) not in around:
                    around.append((at + offset) % len(ring))
            for r, i in chunk:
                shown[r][i] = [pair for place in around for pair in ring[place]]
    return shown


def visible(layer: Reformer, buckets: list[list[int]], places: int | None = None) -> list[list[list[int]]]:
    """For each round and token, the keys that it attends to; one that is shown twice stands twice."""
    seen = []
    for r, tokens in enumerate(windows(layer, buckets, len(buckets[0]) if places is None else places)):
        seen.append([])
        for i, pairs in enumerate(tokens):
            keys = [(s, j) for s, j in pairs if j != i and (j < i or not layer.causal)]
            if not layer.attend_across_buckets:
                keys = [(s, j) for s, j in keys if s == r and buckets[s][j] == buckets[r][i]]
            seen[r].append([j for _, j in keys])
    return seen


def _attend(layer: Reformer, q: Tensor, v: Tensor, buckets: list[list[int]], places: int) -> Tensor:
    D = q.shape[-1]
    k = torch.stack([row / (row.square().sum() + D * layer.key_norm_epsilon).sqrt() for row in q])
    seen = visible(layer, buckets, places)
    rows = []
    for i in range(len(q)):
        everywhere = [j for one in seen for j in one[i]]
        outs, sums = [], []
        for one in seen:
            keys = one[i]
            if not keys:
                continue
            scores = (k[keys] @ q[i]) * layer.scale
            if layer.correct_duplicates:
                scores = scores - torch.tensor([float(everywhere.count(j)) for j in keys], dtype=q.dtype).log()
            sums.append(scores.logsumexp(0))
            outs.append(scores.softmax(0) @ v[keys])
        if not outs:
            rows.append(v[i])
            continue
        z = torch.stack(sums)
        weights = (z - z.logsumexp(0)).exp()
        rows.append(sum(weight * out for weight, out in zip(weights, outs)))
    return torch.stack(rows)
