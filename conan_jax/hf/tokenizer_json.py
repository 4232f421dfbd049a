"""SentencePiece BPE -> the `tokenizer.json` of the `tokenizers` library, with the same ids for every text.

Both grow symbols by merging two neighbours at a time. SentencePiece merges the pair whose joined *piece* has the best score, the
leftmost of equal ones; `tokenizers` merges the *pair* that stands first in a list of merges. They agree because of all the ways to
cut a piece in two, one alone ever occurs: what happens inside a stretch of text before its last merge is what happens when the
stretch is encoded alone, so the cut is the last state of the piece encoded by itself. One merge a piece, by falling score, is
therefore the whole list, and no two merges share a rank.

A space is a space here, not the U+2581 that SentencePiece writes for it: a U+2581 of the text is then an unknown character and
falls to its three bytes, as in `data/tokenizer.py`. There is no normaliser. No special id can be spelled by a text: the special
ids are in the vocabulary and in the post-processor, and not among the added tokens, which are searched for in texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from conan_jax.data.json_tokenizer import framed_by
from conan_jax.data.tokenizer import EOS, UNK, AnyTokenizer, Tokenizer
from conan_jax.errors import DataError

_SPACE = "\u2581"
_TEMPLATE = r"Instruct: [^\n]*\nQuery: "  # query_prompt of a task in one line
_START = r"(?<![\s\S])"  # of the text; `^` is the start of a line to one regex engine and of the text to another

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def tokenizer_json(tokenizer: Tokenizer, prompts: Iterable[str] = (), add_eos: bool = True) -> dict[str, Any]:
    """The content of `tokenizer.json`: the ids of `tokenizer.encode`, then EOS unless `add_eos` is false (a text to be continued).

    A query is trained as the ids of its prompt followed by those of its text. Readers of this file join prompt and text first, so
    a text that begins with "Instruct: ...\\nQuery: ", or with one of `prompts`, is cut there before anything is merged.

    Raises `DataError` when the model is no BPE with byte fallback that leaves its text alone, or when its pieces leave open what
    is merged first.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    _refuse_other_kinds(model)
    vocab = {piece.piece.replace(_SPACE, " ") if piece.type == _Piece.NORMAL else piece.piece: i for i, piece in enumerate(model.pieces)}
    if len(vocab) != len(model.pieces):
        raise DataError("the tokenizer has a piece with a space of its own beside U+2581, which cannot be told apart; train it again")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": prompt_split(prompts),
        "post_processor": framed_by([], [(model.pieces[EOS].piece, EOS)]) if add_eos else None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": model.pieces[UNK].piece, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": _merges(model),
        },
    }


def tokenizer_config(tokenizer: AnyTokenizer, content: dict[str, Any], max_length: int) -> dict[str, Any]:
    """The content of `tokenizer_config.json`: the names of the special ids, and texts of at most `max_length` tokens.

    `content` is that of `tokenizer.json`. `split_special_tokens` makes "</s>" in a text four characters again, once transformers has
    added the special tokens; the tokens of the frame are among those.
    """
    names = {i: token for token, i in content["model"]["vocab"].items()} | {t["id"]: t["content"] for t in content["added_tokens"]}
    ids = {"pad_token": tokenizer.pad_id, "unk_token": tokenizer.unk_id, "bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    named = {key: names[i] for key, i in ids.items() if i is not None}
    framing = [names[i] for i in dict.fromkeys((*tokenizer.prefix_ids, *tokenizer.suffix_ids)) if names[i] not in named.values()]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", **named, **({"additional_special_tokens": framing} if framing else {}),
        "model_max_length": max_length, "padding_side": "right", "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        "split_special_tokens": not tokenizer.reads_special,
    }


def prompt_split(prompts: Iterable[str] = ()) -> dict[str, Any]:
    """A pre-tokeniser that cuts a text where its prompt ends: one of `prompts`, or "Instruct: ...\\nQuery: "."""
    return {"type": "Split", "pattern": {"Regex": _prompt_pattern(prompts)}, "behavior": "Isolated", "invert": False}


def _prompt_pattern(prompts: Iterable[str]) -> str:
    """A prompt at the start of a text; exact ones, the longest first, before the template."""
    exact = sorted({p for p in prompts if p and not re.fullmatch(_TEMPLATE, p)}, key=lambda p: (-len(p), p))
    return f"{_START}(?:{'|'.join([*map(_literal, exact), _TEMPLATE])})"


def _literal(text: str) -> str:
    """`text` for any regex engine: some refuse an escape that they do not need, so only syntax is escaped."""
    return re.sub(r"[\\^$.|?*+()\[\]{}/]", lambda match: "\\" + match.group(), text)


def _merges(model: sentencepiece_model_pb2.ModelProto) -> list[list[str]]:
    """One merge for each piece that can be reached, by falling score."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _Piece.NORMAL}
    characters = {c for piece in scores for c in piece}
    if missing := sorted(c for c in characters if c not in scores):
        raise DataError(f"the tokenizer's pieces use characters that are no pieces themselves ({missing[:5]}); train it again")
    found = [(scores[piece], pair) for piece in scores if len(piece) > 1 and (pair := _last_pair(piece, scores))]
    if len({score for score, _ in found}) != len(found):
        raise DataError("two pieces of the tokenizer have the same score, so its merges have no order; train it again")
    found.sort(key=lambda item: -item[0])
    return [[left.replace(_SPACE, " "), right.replace(_SPACE, " ")] for _, (left, right) in found]


def _last_pair(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The two symbols that `piece`, encoded by itself, consists of before its last merge; None when it never becomes one."""
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [(scores[pair], -i) for i in range(len(symbols) - 1) if (pair := symbols[i] + symbols[i + 1]) in scores]
        if not joined:
            return None
        at = -max(joined)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols[0], symbols[1]


def _refuse_other_kinds(model: sentencepiece_model_pb2.ModelProto) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    needed = {
        "its model_type is not bpe": trainer.model_type == trainer.BPE,
        "it has no byte fallback": trainer.byte_fallback,
        "it changes the text before encoding": not normalizer.precompiled_charsmap,
        "it adds a space before a text": not normalizer.add_dummy_prefix,
        "it removes white space": not normalizer.remove_extra_whitespaces,
        "it does not write a space as U+2581": normalizer.escape_whitespaces,
        "it holds user-defined or unused pieces": all(piece.type not in (_Piece.USER_DEFINED, _Piece.UNUSED) for piece in model.pieces),
    }
    if wrong := [what for what, fine in needed.items() if not fine]:
        raise DataError(f"the tokenizer cannot be written as tokenizer.json: {'; '.join(wrong)}; train one with `conan tokenizer train`")
