"""Tokenizers: by Hugging Face name, from a folder or vocab.txt, or WordPiece trained on the run's own text."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterable
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


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with padding id 0 and [CLS], [SEP], [MASK] tokens."""
    path = Path(name)
    vocab = path / "vocab.txt" if path.is_dir() else path
    if vocab.name.endswith(".txt") and vocab.is_file() and not (path / "tokenizer.json").is_file():
        tokenizer = wrap(wordpiece(models.WordPiece.from_file(str(vocab), unk_token="[UNK]")))
    else:
        if path.exists() and not (path / "tokenizer.json").is_file():
            raise DataError(f"tokenizer: {name} holds neither tokenizer.json nor vocab.txt")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=not hub_is_reachable())
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"tokenizer: '{name}' is no folder here and cannot be loaded from the hub ({reason}); accepted: a Hugging "
                "Face name such as bert-base-uncased, a folder with tokenizer.json or vocab.txt, or 'train'"
            ) from None
    missing = [special for special in SPECIAL if getattr(tokenizer, special) is None]
    if missing or tokenizer.pad_token_id != 0:
        raise DataError(
            f"tokenizer: '{name}' has padding id {tokenizer.pad_token_id} and lacks {missing or 'nothing'}; the model needs "
            "padding id 0 and the special tokens of BERT"
        )
    return tokenizer


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


def wordpiece(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
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
