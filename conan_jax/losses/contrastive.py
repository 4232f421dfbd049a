"""InfoNCE over the global batch, with hard negatives and a false-negative mask (METHODS 1.5).

Under `jit` on sharded arrays `queries @ positives.T` already spans the global batch, so nothing here names a mesh axis.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

DROPPED = -1e30  # a logit that weighs nothing; finite, so that no row ever computes inf - inf


def info_nce(
    queries: Float[Array, "B D"],
    positives: Float[Array, "B D"],
    negatives: Float[Array, "B S D"] | None = None,
    negative_mask: Float[Array, "B S"] | None = None,
    *,
    temperature: float | Float[Array, ""] = 0.02,
    in_batch_negatives: bool = True,
    false_negative_margin: float | None = None,
    query_query: bool = False,
    passage_passage: bool = False,
    symmetric: bool = False,
    query_hash: UInt32[Array, "B 2"] | None = None,
    positive_hash: UInt32[Array, "B 2"] | None = None,
    negative_hash: UInt32[Array, "B S 2"] | None = None,
    valid: Bool[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean over queries i of  -log( exp(s(q_i,p_i)/t) / sum_j exp(s(q_i,c_j)/t) ),  s the inner product of unit vectors.

    The candidates c_j are every positive and every hard negative of the global batch; without `in_batch_negatives`
    only p_i and the negatives of example i, and the three options below are off with them.

    Args:
        queries, positives, negatives: L2-normalised vectors; computed in float32.
        negative_mask: 0 where a slot is empty.
        temperature: t, in units of cosine.
        false_negative_margin: drop candidate j when s(q_i,c_j) > s(q_i,p_i) + margin. None: no such test.
        query_query: add the other queries of the batch as candidates, s(q_i,q_j) (GTE, arXiv 2308.03281).
        passage_passage: add s(p_i,p_j) for the other positives of the batch.
        symmetric: average with the loss of finding q_i among the batch's queries from p_i.
        query_hash, positive_hash, negative_hash: 64-bit text hashes. When given, a candidate whose text is that of p_i
            or q_i is dropped: it is no negative.
        valid: False where an example is empty; it then is neither a query nor a candidate.

    Returns:
        (loss, metrics), float32 scalars: `positive_score`, `negative_score` (mean over kept negatives),
        `accuracy` (share of queries whose positive beats every kept negative), `masked` (share of negatives dropped as false).
        The positive itself is never dropped; a query left without negatives has loss 0.
    """
    queries, positives = queries.astype(jnp.float32), positives.astype(jnp.float32)
    size = queries.shape[0]
    valid = jnp.ones(size, bool) if valid is None else valid
    positive_scores = jnp.sum(queries * positives, axis=-1)
    other = ~jnp.eye(size, dtype=bool) & valid[None, :] & valid[:, None]

    def genuine(scores, *same_text):
        """True where a candidate may be a negative; comparisons carry no gradient."""
        keep = jnp.ones(scores.shape, bool)
        if false_negative_margin is not None:
            keep &= scores <= positive_scores[:, None] + false_negative_margin
        for same in same_text:
            keep &= ~same
        return keep

    def same_as_pair(candidate_hash):
        return [_equal(own, candidate_hash) for own in (positive_hash, query_hash) if own is not None and candidate_hash is not None]

    blocks = []  # (scores, present, genuine), each [B, candidates]
    if in_batch_negatives:
        scores = queries @ positives.T
        blocks.append((scores, other, genuine(scores, *same_as_pair(positive_hash))))
        if query_query:
            scores = queries @ queries.T
            blocks.append((scores, other, genuine(scores, *same_as_pair(query_hash))))
        if passage_passage:
            scores = positives @ positives.T
            blocks.append((scores, other, genuine(scores, *same_as_pair(positive_hash))))
    if negatives is not None:
        negatives = negatives.astype(jnp.float32)
        filled = jnp.ones(negatives.shape[:2], bool) if negative_mask is None else negative_mask > 0
        filled &= valid[:, None]
        if in_batch_negatives:
            scores = queries @ negatives.reshape(-1, negatives.shape[-1]).T
            hashes = None if negative_hash is None else negative_hash.reshape(-1, 2)
            present = filled.reshape(1, -1) & valid[:, None]
        else:
            scores, hashes, present = jnp.einsum("bd,bsd->bs", queries, negatives), negative_hash, filled
        blocks.append((scores, present, genuine(scores, *same_as_pair(hashes))))
    if not blocks:
        raise ValueError("InfoNCE needs negatives: give hard negatives or turn in_batch_negatives on")

    scores, present, kept = (jnp.concatenate(parts, axis=1) for parts in zip(*blocks, strict=True))
    kept &= present
    losses = _cross_entropy(positive_scores, scores, kept, temperature)
    if symmetric and in_batch_negatives:
        reverse = blocks[0][0].T
        same = [*same_as_pair(query_hash), *([] if positive_hash is None else [_equal(positive_hash, positive_hash)])]
        losses = (losses + _cross_entropy(positive_scores, reverse, other & genuine(reverse, *same), temperature)) / 2

    hardest = jnp.max(jnp.where(kept, scores, DROPPED), axis=1)
    metrics = {
        "positive_score": _mean(positive_scores, valid),
        "negative_score": _mean(scores, kept),
        "accuracy": _mean(positive_scores > hardest, valid),
        "masked": _mean(~kept, present),
    }
    return _mean(losses, valid), metrics


def _cross_entropy(positive_scores, scores, kept, temperature):
    """-log softmax of the positive among itself and the kept scores: [B]."""
    logits = jnp.concatenate([positive_scores[:, None], jnp.where(kept, scores, DROPPED)], axis=1) / temperature
    return jax.nn.logsumexp(logits, axis=1) - logits[:, 0]


def _equal(own, candidates):
    """[B, 2] against [M, 2] or [B, M, 2] -> Bool[B, M]: both halves of the hash agree."""
    return jnp.all(own[:, None, :] == candidates, axis=-1)


def _mean(values, where):
    """Mean of `values` over `where`, 0 when nothing is there."""
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where), 1).astype(jnp.float32)
