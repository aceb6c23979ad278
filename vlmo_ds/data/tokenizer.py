"""Tokenizers: by Hugging Face name, from a folder or vocab.txt, or WordPiece trained on the run's own text."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub.constants import ENDPOINT
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmo_ds.data.storage import DataError

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

MAX_ALPHABET = 1000


def load_tokenizer(
    name: str, special: Sequence[str] = tuple(SPECIAL), padding: int | None = 0
) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens (transformers' names; BERT's) and this padding id (None: any). DataError where
    there is none of this name."""
    path = Path(name)
    vocab = path / "vocab.txt" if path.is_dir() else path
    if vocab.name.endswith(".txt") and vocab.is_file() and not (path / "tokenizer.json").is_file():
        tokenizer = from_vocabulary(vocab)
    else:
        if path.exists() and not (path / "tokenizer.json").is_file():
            raise DataError(f"tokenizer: {name} holds neither tokenizer.json nor vocab.txt")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=path.is_dir() or not hub_is_reachable())
        except Exception as error:  # of damaged files the libraries raise whatever they come upon
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            where = "cannot be read" if path.is_dir() else "is no folder here and cannot be loaded from the hub"
            raise DataError(
                f"tokenizer: '{name}' {where} ({reason}); accepted: a Hugging Face name such as bert-base-uncased, a folder "
                "with tokenizer.json or vocab.txt, or 'train'"
            ) from None
    missing = [token for token in special if getattr(tokenizer, token) is None]
    wrong_padding = padding is not None and tokenizer.pad_token_id != padding
    if missing or wrong_padding:
        wanted = [f"padding id {padding}"] if padding is not None else []
        raise DataError(
            f"tokenizer: '{name}' has padding id {tokenizer.pad_token_id} and lacks {missing or 'nothing'}; the model needs "
            f"{' and '.join([*wanted, 'the special tokens ' + ', '.join(special)])}"
        )
    return tokenizer


def from_vocabulary(vocab: Path) -> PreTrainedTokenizerFast:
    """BERT's WordPiece with the pieces of a vocab.txt, one a line.

    Cased or not, with accents or without: as tokenizer_config.json beside it says, else as the pieces are.
    """
    try:
        pieces = vocab.read_text("utf-8").split("\n")
        model = models.WordPiece.from_file(str(vocab), unk_token="[UNK]")
    except Exception as error:  # the library raises a bare one
        raise DataError(f"tokenizer: {vocab} is no list of word pieces, one a line ({error})") from None
    settings = tokenizer_settings(vocab.with_name("tokenizer_config.json")) if vocab.name == "vocab.txt" else {}
    words = [piece for piece in pieces if not re.fullmatch(r"\[.*\]|<.*>", piece)]
    lowercase = settings.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(map(has_capitals, words))
        strips = lowercase and not any(map(has_accents, words))
    else:
        strips = lowercase  # BERT strips accents where it lower-cases
    if (said := settings.get("strip_accents")) is not None:
        strips = said
    return wrap(wordpiece(model, lowercase, strips, settings.get("tokenize_chinese_chars") is not False))


def tokenizer_settings(file: Path) -> dict[str, bool | None]:
    """How text is normalised, as far as the file says; nothing where there is no such file."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"tokenizer: {file} cannot be read: {error}") from None
    kept = {name: found.get(name) for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars")}
    for name, value in kept.items():
        if value not in (True, False, None):
            raise DataError(f"tokenizer: {file} has {name} {value!r}; accepted: true, false or null")
    return kept


def has_capitals(word: str) -> bool:
    return word != word.lower() and any(unicodedata.category(c) == "Lu" for c in word)


def has_accents(word: str) -> bool:
    """Whether BERT would strip something: of what Unicode writes as a letter and a mark, the mark."""
    return not word.isascii() and any(unicodedata.category(c) == "Mn" for c in unicodedata.normalize("NFD", word))


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub answers: without this question, a machine without a network waits a minute for retries."""
    if "https" in getproxies():
        return True
    address = urlsplit(ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
    except OSError:
        return False
    return True


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """WordPiece in the manner of bert-base-uncased, trained on the given texts: the same texts, the same vocabulary.

    The library numbers the single characters in the order of a hash map, which differs from process to process, and
    breaks ties between merges by those numbers. Passing the sorted characters as special tokens fixes the numbers; the
    tokenizer is then built from the vocabulary alone, so that they are no special tokens in use.
    """
    learner = wordpiece(models.WordPiece(unk_token="[UNK]"))
    texts = list(texts)
    characters = sorted({c for text in texts for c in learner.normalizer.normalize_str(text)} - {" "})[:MAX_ALPHABET]
    fixed = [*SPECIAL.values(), *characters, *(f"##{c}" for c in characters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=max(vocab_size, len(fixed)),
        special_tokens=fixed,
        limit_alphabet=MAX_ALPHABET,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return wrap(wordpiece(models.WordPiece(learner.get_vocab(), unk_token="[UNK]")))


def wordpiece(
    model: models.WordPiece, lowercase: bool = True, strip_accents: bool = True, chinese: bool = True
) -> Tokenizer:
    """chinese: a space around every Chinese character."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    ids = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    if None in ids.values():
        raise DataError(f"tokenizer: the vocabulary of {tokenizer.get_vocab_size()} pieces has no [CLS] or no [SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of which word piece each number means. Weights fit a vocabulary of this digest alone."""
    pieces = sorted((number, piece) for piece, number in tokenizer.get_vocab().items())
    return hashlib.blake2b(json.dumps(pieces).encode(), digest_size=16).hexdigest()
