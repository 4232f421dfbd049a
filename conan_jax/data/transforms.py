"""Records -> fixed-shape arrays: text batches, candidate pools, labels, text hashes.

A text batch is `{"tokens": Int32[B L], "lengths": Int32[B], "prompt_lengths": Int32[B]}`, right-padded with the
tokenizer's pad id. Every text is in the tokenizer's frame, also when it was cut: `prefix_ids` before it, `suffix_ids` after it (of
tokenizers trained here: EOS). The instruction is tokenised apart from the text, so `prompt_lengths` is exact: those tokens, and the
prefix before them, are attended to, not pooled (METHODS 1.7).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt32

from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.errors import DataError

Record = Mapping[str, Any]
Batch = dict[str, Any]

_USUAL_CHARACTERS = 6  # of a token; fewer than this in nearly all text
_AFFECTED = 64  # tokens before a cut that another tokenizer may see otherwise without what stood after it
PAIR_KINDS = ("pair", "retrieval", "sft")


def query_prompt(instruction: str) -> str:
    """What stands before a query: "Instruct: {task}\\nQuery: " (METHODS 1.7), nothing when there is no instruction."""
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


def text_hash(text: str) -> UInt32[np.ndarray, "2"]:
    """64 stable bits of a text (BLAKE2b), as two little-endian uint32: equal texts are never each other's negatives."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), dtype="<u4").astype(np.uint32)


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2^32) from any names and numbers; the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=4).digest(), "little")


def encode_text(tokenizer: AnyTokenizer, text: str, length: int, instruction: str = "") -> tuple[Int32[np.ndarray, "L"], int, int]:
    """One text as `(tokens[L], length, prompt_length)`: prompt and text in their frame; the text is cut where it does not fit."""
    batch = encode_texts(tokenizer, [text], length, [instruction])
    return batch["tokens"][0], int(batch["lengths"][0]), int(batch["prompt_lengths"][0])


def encode_texts(tokenizer: AnyTokenizer, texts: Sequence[str], length: int, instructions: Sequence[str] | None = None) -> Batch:
    """A text batch of `length` tokens a row.

    Raises `DataError` when an instruction leaves no room for one token of text and EOS.
    """
    prompts = _prompts(tokenizer, instructions or ())
    prefix, suffix = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    for instruction, prompt in prompts.items():
        if len(prefix) + len(prompt) + len(suffix) + 1 > length:
            raise DataError(f"the instruction {instruction[:60]!r} takes {len(prompt)} tokens and leaves no room for a text in {length}: "
                            "shorten the instruction or raise the length of the bucket")
    encoded = encode_heads(tokenizer, texts, length)
    tokens = np.full((len(texts), length), tokenizer.pad_id, np.int32)
    lengths = np.empty(len(texts), np.int32)
    prompt_lengths = np.zeros(len(texts), np.int32)
    for i, content in enumerate(encoded):
        prompt = prompts[instructions[i]] if instructions else []
        start = prefix + prompt
        row = start + content[: max(length - len(start) - len(suffix), 0)] + suffix
        tokens[i, : len(row)] = row
        lengths[i] = len(row)
        prompt_lengths[i] = len(start) if prompt else 0
    return {"tokens": tokens, "lengths": lengths, "prompt_lengths": prompt_lengths}


def count_tokens(
    tokenizer: AnyTokenizer, texts: Sequence[str], instructions: Sequence[str], num_threads: int = 1
) -> Int32[np.ndarray, "B"]:
    """The row length each text would need uncut: prompt and text in the tokenizer's frame."""
    prompts, frame = _prompts(tokenizer, instructions), len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
    encoded = tokenizer.encode_batch(texts, num_threads)
    return np.array([len(ids) + len(prompts[i]) + frame for ids, i in zip(encoded, instructions)], np.int32)


def record_texts(kind: str, record: Record) -> list[str]:
    """The texts of a record that a language model or a tokenizer may learn from; mined negatives are left out."""
    match kind:
        case "text" | "labelled":
            return [record["text"]]
        case "sft":
            return [sft_prompt(record), record["output"]]
        case "pair":
            return [record["query"], record["pos"]]
        case "retrieval":
            return [record["query"], *record["pos"]]
        case "sts":
            return [record["sentence1"], record["sentence2"]]
    raise DataError(f"unknown record kind {kind!r}")


def sft_prompt(record: Record) -> str:
    """What the model reads before the output of an sft record: the instruction, then the input on a new line if there is one."""
    return record["instruction"] + "\n" + record["input"] if record.get("input") else record["instruction"]


def as_pair(kind: str, record: Record, pick: int = 0) -> tuple[str, str]:
    """A record as (query, positive): sft gives (instruction and input, output), retrieval its positive number `pick` mod their count.

    Raises `DataError` for kinds that hold no pair.
    """
    if kind == "pair":
        return record["query"], record["pos"]
    if kind == "retrieval":
        return record["query"], record["pos"][pick % len(record["pos"])]
    if kind == "sft":
        return sft_prompt(record), record["output"]
    raise DataError(f"records of kind {kind!r} are no pairs; use one of {', '.join(PAIR_KINDS)}")


def instruction_of(kind: str, record: Record, default: str) -> str:
    """The task in the query prompt: the record's own, else the dataset's. An sft record's instruction is its text, not its task."""
    return default if kind == "sft" else record.get("instruction") or default


def candidates(record: Record, pool_size: int, skip_top: int) -> list[str]:
    """The first `pool_size` negatives, hardest first, after the top `skip_top`; without positives, the query's text, repeats."""
    known = {record["query"], *record["pos"]}
    pool: list[str] = []
    for text in record["neg"][skip_top:]:
        if len(pool) == pool_size:
            break
        if text not in known:
            known.add(text)
            pool.append(text)
    return pool


def pair_batch(
    tokenizer: AnyTokenizer, ids: Sequence[int], queries: Sequence[str], positives: Sequence[str], instructions: Sequence[str],
    lengths: tuple[int, int],
) -> Batch:
    """The batch of the weak stage: `ids`, `query`, `positive`, `query_hash`, `positive_hash` (docs/ARCHITECTURE.md)."""
    return {
        "ids": np.asarray(ids, np.int32),
        "query": encode_texts(tokenizer, queries, lengths[0], instructions),
        "positive": encode_texts(tokenizer, positives, lengths[1]),
        "query_hash": _hashes(queries),
        "positive_hash": _hashes(positives),
    }


def pool_batch(tokenizer: AnyTokenizer, pools: Sequence[Sequence[str]], pool_size: int, length: int) -> Batch:
    """Candidate pools: `pool` {tokens Int32[B P L], lengths Int32[B P]}, `pool_hash` UInt32[B P 2], `pool_size` Int32[B]."""
    stacked, sizes = stack_texts(tokenizer, pools, pool_size, length)
    hashes = np.zeros((len(pools), pool_size, 2), np.uint32)
    for i, pool in enumerate(pools):
        hashes[i, : len(pool)] = _hashes(pool)
    return {"pool": stacked, "pool_hash": hashes, "pool_size": sizes}


def stack_texts(
    tokenizer: AnyTokenizer, groups: Sequence[Sequence[str]], size: int, length: int,
) -> tuple[Batch, Int32[np.ndarray, "B"]]:
    """Groups of at most `size` texts as {tokens Int32[B size L], lengths Int32[B size]} and the number of texts of each; the rest is 0."""
    flat = encode_texts(tokenizer, [text for group in groups for text in group], length)
    tokens = np.full((len(groups), size, length), tokenizer.pad_id, np.int32)
    lengths = np.zeros((len(groups), size), np.int32)
    sizes = np.array([len(group) for group in groups], np.int32)
    filled = np.arange(size) < sizes[:, None]
    tokens[filled] = flat["tokens"]
    lengths[filled] = flat["lengths"]
    return {"tokens": tokens, "lengths": lengths}, sizes


def label_text(label: str) -> str:
    """A label as words: `card_arrival` -> `card arrival`."""
    return label.replace("_", " ").strip() or label


def sts_batch(
    tokenizer: AnyTokenizer, ids: Sequence[int], records: Sequence[Record], instructions: Sequence[str], lengths: tuple[int, int],
) -> Batch:
    """`ids`, `sentence1`, `sentence2`, `score` Float32[B] as given. The task is symmetric, so both sides carry the instruction."""
    return {
        "ids": np.asarray(ids, np.int32),
        "sentence1": encode_texts(tokenizer, [r["sentence1"] for r in records], lengths[0], instructions),
        "sentence2": encode_texts(tokenizer, [r["sentence2"] for r in records], lengths[1], instructions),
        "score": np.array([r["score"] for r in records], np.float32),
    }


def encode_heads(tokenizer: AnyTokenizer, texts: Sequence[str], length: int) -> list[list[int]]:
    """The tokens of each text, at least the first `length` of a longer one: most of a long document need not be encoded."""
    limit = max((length + 1) * tokenizer.max_piece_length, length * _USUAL_CHARACTERS)  # more characters cannot fit
    if tokenizer.splits_at_spaces:
        heads, enough = [_head(text, length * _USUAL_CHARACTERS, limit) for text in texts], length
    else:  # a cut may change tokens before it, but none so far before it
        enough, limit = length + _AFFECTED + tokenizer.max_piece_length, sys.maxsize
        heads = [text[: 2 * enough * _USUAL_CHARACTERS] for text in texts]
    encoded = tokenizer.encode_batch(heads)
    short = [i for i, text in enumerate(texts) if len(encoded[i]) < enough and len(heads[i]) < min(len(text), limit)]
    for i, ids in zip(short, tokenizer.encode_batch([texts[i][:limit] for i in short])):
        encoded[i] = ids
    return encoded


def _head(text: str, size: int, limit: int) -> str:
    """`text` up to the last white space before `size`: no token spans that place, so its tokens are the first ones of the whole.

    Where there is no white space, the first `limit` characters.
    """
    if len(text) <= size:
        return text
    cut = text.rfind(" ", 0, size)
    while cut > 0 and text[cut - 1] == " ":
        cut -= 1
    return text[: cut if cut > 0 else limit]


def _prompts(tokenizer: AnyTokenizer, instructions: Sequence[str]) -> dict[str, list[int]]:
    unique = list(dict.fromkeys(instructions))
    return dict(zip(unique, tokenizer.encode_batch([query_prompt(i) for i in unique])))


def _hashes(texts: Sequence[str]) -> UInt32[np.ndarray, "B 2"]:
    return np.stack([text_hash(text) for text in texts]) if len(texts) else np.zeros((0, 2), np.uint32)
