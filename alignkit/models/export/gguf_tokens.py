"""A tokenizer as a GGUF file holds it, and the tokenizer that such a file describes.

The format has two kinds. `gpt2` is byte-level BPE with merges, where the file only *names* how
text is split into words; `llama` is BPE over characters with scores and a fallback to bytes. A
tokenizer is recognised by what its tokenizer.json does, never by the name of the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from alignkit.errors import ModelError
from alignkit.models.transformers_parts import generate_merges

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in the format."""

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

CUTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((_GPT2,), False),
    "smollm": ((r"\p{N}", _GPT2), False),
    "llama-bpe": ((_WORDS + r"\p{N}{1,3}" + _TAIL,), True),
    "qwen2": ((_WORDS + r"\p{N}" + _TAIL,), False),
    "tekken": (
        (
            f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ),
}
"""Name in the format -> the expressions that split text one after another, and whether a whole word
that is a token is taken before any merge."""


@dataclass
class Vocabulary:
    """What the file says about the tokenizer.

    Args:
        kind: `gpt2` or `llama`.
        cut: one of `CUTS` for `gpt2`; `default` for `llama`.
        tokens: text of each id, as many as the model has embeddings.
        types: of each id.
        scores: of each id for `llama`: the higher, the sooner it is merged.
        merges: for `gpt2`, pairs joined by a space, in the order of merging.
        special: `bos`, `eos`, `unk`, `pad`, `eot` -> id, for those that exist.
        add_bos: a text starts with BOS.
        add_space: a text starts as if a space stood before it.
        space_after_special: the same holds after every special token.
        templates: name -> chat template; `default` is the one in use.
        notes: sentences the user must know.
    """

    kind: str
    cut: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_space: bool
    space_after_special: bool
    templates: dict[str, str]
    notes: list[str] = field(default_factory=list)


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, rows: int, stops: Sequence[int]
) -> Vocabulary:
    """A tokenizer in the format's terms.

    Args:
        tokenizer: a transformers tokenizer.
        rows: of the model's embedding.
        stops: ids that end a response.

    Raises:
        ModelError: the format has no such tokenizer, or it is larger than the model.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise _unknown("it has no tokenizer.json")
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    if about["model"]["type"] != "BPE":
        raise _unknown(f"it is {about['model']['type']}, not BPE")
    tokens = _tokens(tokenizer, rows)
    kind = "llama" if about["model"].get("byte_fallback") else "gpt2"
    notes: list[str] = []
    cut, space, after = "default", False, True
    if kind == "gpt2":
        cut = _named_cut(about, notes)
    else:
        space, after = _leading_space(about)
    for added in about["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            notes.append(f"{added['content']!r} absorbs spaces next to it; in GGUF it does not")
    if kind == "llama" and not after:
        notes.append(
            "after a special token, and before a text that starts with a space, readers of GGUF "
            "see one space more than this tokenizer"
        )
    templates = tokenizer.chat_template or {}
    return Vocabulary(
        kind=kind,
        cut=cut,
        tokens=tokens,
        types=_types(about, tokens, kind),
        scores=_scores(about, tokens) if kind == "llama" else [],
        merges=[" ".join(pair) for pair in _merges(about)] if kind == "gpt2" else [],
        special=_special(tokenizer, stops),
        add_bos=_adds_bos(tokenizer),
        add_space=space,
        space_after_special=after,
        templates={"default": templates} if isinstance(templates, str) else dict(templates),
        notes=notes,
    )


def _unknown(why: str) -> ModelError:
    return ModelError(
        f"this tokenizer cannot be written to GGUF: {why}",
        hint="serve the folder itself; the format has byte-level BPE that splits text like "
        f"{', '.join(CUTS)}, and BPE with ▁ and byte fallback",
    )


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[str]:
    by_id = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {max(by_id)}, but the model's embedding has {rows} rows",
            hint="resize the model's embedding: tokens were added without it",
        )
    return [by_id.get(number, f"[PAD{number}]") for number in range(rows)]


def _named_cut(about: dict[str, Any], notes: list[str]) -> str:
    """The format's name for how text is split into words."""
    normalizer = about["normalizer"]
    if normalizer is not None and normalizer["type"] == "NFC":
        notes.append(
            "this tokenizer composes characters first (NFC), but readers of GGUF do not: text in "
            "decomposed Unicode gets other tokens"
        )
    elif normalizer is not None:
        raise _unknown(f"it changes text first ({normalizer['type']})")
    cuts = tuple(_cuts(about["pre_tokenizer"]))
    for name, (known, whole_words) in CUTS.items():
        if cuts == known:
            own = bool(about["model"].get("ignore_merges"))
            if own != whole_words and not _merges_reach_all(about):
                raise _unknown(f"merges do not give some of its tokens, and {name} relies on them")
            return name
    raise _unknown(f"it splits words in a way that has no name there: {' then '.join(cuts)}")


def _cuts(step: dict[str, Any] | None) -> list[str]:
    if step is None:
        raise _unknown("it does not split text into words")
    if step["type"] == "Sequence":
        return [cut for inner in step["pretokenizers"] for cut in _cuts(inner)]
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return [_GPT2] if step["use_regex"] else []
    if step["type"] == "Digits" and step["individual_digits"]:
        return [r"\p{N}"]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return [step["pattern"].get("Regex", str(step["pattern"]))]
    raise _unknown(f"it splits text with {step}")


def _merges(about: dict[str, Any]) -> list[tuple[str, str]]:
    return [_halves(pair) for pair in about["model"]["merges"]]


def _halves(pair: str | Sequence[str]) -> tuple[str, str]:
    first, second = pair.split(" ", 1) if isinstance(pair, str) else pair
    return first, second


def _merges_reach_all(about: dict[str, Any]) -> bool:
    """Whether merging the characters of every token gives that token."""
    merger = models.BPE(vocab=about["model"]["vocab"], merges=_merges(about))
    added = {token["content"] for token in about["added_tokens"]}
    words = (word for word in about["model"]["vocab"] if word not in added)
    return all(len(merger.tokenize(word)) == 1 for word in words)


def _leading_space(about: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a space is added before a text, and before every part after a special token."""
    normalizer, cut = about["normalizer"], about["pre_tokenizer"]
    steps = (normalizer.get("normalizers") or [normalizer]) if normalizer else []
    kinds = [step["type"] for step in steps]
    if kinds == ["Prepend", "Replace"] and cut is None:
        return True, True
    if kinds == ["Replace"] and steps[0]["pattern"] == {"String": " "}:
        joined = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
        if cut is None or {**cut, "invert": None} == {**joined, "invert": None}:
            return False, True
    if not kinds and cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True):
        scheme = cut["prepend_scheme"]
        return scheme != "never", scheme != "first"
    raise _unknown(f"it prepares text with {normalizer} and {cut}")


def _types(about: dict[str, Any], tokens: list[str], kind: str) -> list[int]:
    types = [UNUSED if text == f"[PAD{number}]" else NORMAL for number, text in enumerate(tokens)]
    if kind == "llama":
        for byte in range(256):
            number = about["model"]["vocab"].get(f"<0x{byte:02X}>")
            if number is None:
                raise _unknown(f"the byte {byte:#04x} has no token to fall back to")
            types[number] = BYTE
    for added in about["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = about["model"].get("unk_token")
    if kind == "llama" and unknown in about["model"]["vocab"]:
        types[about["model"]["vocab"][unknown]] = UNKNOWN
    return types


def _scores(about: dict[str, Any], tokens: list[str]) -> list[float]:
    """Minus the rank of the merge that makes a token; readers merge the highest first."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(about)):
        ranks.setdefault("".join(pair), rank)
    bottom = float(-len(ranks) - 1)
    return [-float(ranks[text]) if text in ranks else bottom for text in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    turn_ends = [stop for stop in stops if stop != ids["eos"]]
    ids["eot"] = turn_ends[0] if turn_ends else None
    return {name: int(number) for name, number in ids.items() if number is not None}


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer("a")["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        raise _unknown("it puts EOS after every text")
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def tokenizer_from(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that a file describes, without BOS, from the file alone."""
    vocab = {text: number for number, text in enumerate(vocabulary.tokens)}
    if vocabulary.kind == "gpt2":
        cuts, whole_words = CUTS[vocabulary.cut]
        merges = [_halves(pair) for pair in vocabulary.merges]
        built = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
        steps = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        built.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_only])
    else:
        scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
        merges = generate_merges(vocab, scores)
        unknown = vocabulary.tokens[vocabulary.special.get("unk", 0)]
        built = Tokenizer(
            models.BPE(
                vocab=vocab, merges=merges, byte_fallback=True, unk_token=unknown, fuse_unk=True
            )
        )
        spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
        if vocabulary.add_space:
            spaces.insert(0, normalizers.Prepend("▁"))
        built.normalizer = normalizers.Sequence(spaces)
    whole = (CONTROL, USER_DEFINED, UNKNOWN)
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    added = [AddedToken(t, special=True, normalized=False) for t, kind in pairs if kind in whole]
    built.add_special_tokens(added)
    return built
