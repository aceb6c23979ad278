"""Tokenizers: by Hugging Face name, from a folder or a file, or word pieces trained on the run's own text."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import socket
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import ftfy
from huggingface_hub.constants import ENDPOINT
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlmo_ds.config import TokenizerKind
from vlmo_ds.data.storage import DataError

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

MAX_ALPHABET = 1000
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # of bpe_simple_vocab_16e6.txt.gz those that make CLIP's vocabulary, less its first line
CLIP_WORDS = (  # CLIP's, arXiv:2103.00020, section 2.4
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# A word with the space before it. Vowel signs (\p{M}) and the joiners of Indian and Persian words belong to it, which GPT-2's pattern cuts off.
BYTE_WORDS = r" ?[\p{L}\p{M}\u200c\u200d]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+"


class ClipTokenizer(PreTrainedTokenizerFast):
    """CLIP's byte pairs. Texts are cleaned as CLIP's code does: broken encodings are mended, HTML entities resolved."""

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        return super().__call__(cleaned(text), *args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As one that any code reads, without the cleaning."""
        plain = PreTrainedTokenizerFast(tokenizer_object=self.backend_tokenizer, **CLIP_SPECIAL)
        return plain.save_pretrained(save_directory, *args, **kwargs)


CLIP_SPECIAL = {"bos_token": CLIP_START, "eos_token": CLIP_END, "unk_token": CLIP_END, "pad_token": CLIP_END}


def cleaned(text: Any) -> Any:
    """A text, or each of a list of them."""
    if isinstance(text, str):
        return html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return [cleaned(one) for one in text] if isinstance(text, (list, tuple)) else text


def load_tokenizer(
    name: str, special: Sequence[str] = tuple(SPECIAL), padding: int | None = 0
) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens (transformers' names; BERT's) and this padding id (None: any). DataError where
    there is none of this name."""
    path = Path(name)
    vocab = path / "vocab.txt" if path.is_dir() else path
    pairs = path / "merges.txt"
    if path.name.endswith(".txt.gz") and path.is_file():
        tokenizer = byte_pairs(*pairs_of_clip(path))
    elif path.suffix in (".spm", ".model") and path.is_file():
        tokenizer = from_sentencepiece(path)
    elif pairs.is_file() and (path / "vocab.json").is_file() and not (path / "tokenizer.json").is_file():
        tokenizer = byte_pairs(*pairs_of_folder(path))
    elif vocab.name.endswith(".txt") and vocab.is_file() and not (path / "tokenizer.json").is_file():
        tokenizer = from_vocabulary(vocab)
    else:
        if path.exists() and not (path / "tokenizer.json").is_file():
            raise DataError(
                f"tokenizer: {name} holds neither tokenizer.json nor vocab.txt, nor vocab.json with merges.txt"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=path.is_dir() or not hub_is_reachable())
        except Exception as error:  # of damaged files the libraries raise whatever they come upon
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            where = "cannot be read" if path.is_dir() else "is no folder here and cannot be loaded from the hub"
            raise DataError(
                f"tokenizer: '{name}' {where} ({reason}); accepted: a Hugging Face name such as bert-base-uncased, a folder "
                "with tokenizer.json, vocab.txt, or vocab.json and merges.txt, CLIP's bpe_simple_vocab_16e6.txt.gz, a SentencePiece model "
                "(.spm, .model), or 'train'"
            ) from None
        if tokenizer.bos_token == CLIP_START and tokenizer.is_fast:
            vocabulary = tokenizer.get_vocab()
            model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
            tokenizer = byte_pairs(vocabulary, [tuple(pair) for pair in model["merges"]])
    missing = [token for token in special if getattr(tokenizer, token) is None]
    wrong_padding = padding is not None and tokenizer.pad_token_id != padding
    if missing or wrong_padding:
        wanted = [f"padding id {padding}"] if padding is not None else []
        raise DataError(
            f"tokenizer: '{name}' has padding id {tokenizer.pad_token_id} and lacks {missing or 'nothing'}; the model needs "
            f"{' and '.join([*wanted, 'the special tokens ' + ', '.join(special)])}"
        )
    if (around := len(tokenizer("")["input_ids"])) != 2:
        raise DataError(
            f"tokenizer: '{name}' puts {around} ids around a text; accepted: one that marks its start and its end, as BERT's and "
            "CLIP's do"
        )
    return tokenizer


def pairs_of_clip(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of CLIP's bpe_simple_vocab_16e6.txt.gz, which numbers bytes, bytes that end a word, merges, and
    the two special tokens."""
    try:
        lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : CLIP_MERGES + 1]
        merges = [(first, second) for first, second in (line.split() for line in lines)]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"tokenizer: {file} is no list of byte pairs such as bpe_simple_vocab_16e6.txt.gz ({error})"
        ) from None
    alphabet = bytes_to_characters()
    pieces = [*alphabet, *(f"{c}</w>" for c in alphabet), *map("".join, merges), CLIP_START, CLIP_END]
    return {piece: number for number, piece in enumerate(pieces)}, merges


def bytes_to_characters() -> list[str]:
    """The characters that stand for the 256 bytes, in the order of CLIP's numbers: printable ones first, as themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + number) for number in range(others)]


def pairs_of_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Those of vocab.json and merges.txt, as transformers keeps CLIP's."""
    try:
        vocabulary = json.loads((folder / "vocab.json").read_bytes())
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if not isinstance(vocabulary, dict) or any(len(pair) != 2 for pair in merges):
            raise ValueError("vocab.json is no object, or a line of merges.txt no pair")
        if missing := [token for token in (CLIP_START, CLIP_END) if token not in vocabulary]:
            raise ValueError(f"vocab.json lacks {missing[0]}: it is not CLIP's")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"tokenizer: {folder} holds a vocab.json and merges.txt that cannot be used ({error})"
        ) from None
    return vocabulary, merges  # type: ignore[return-value]  # pairs, by the check above


def byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> ClipTokenizer:
    try:
        model = models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=CLIP_END)
    except Exception as error:  # the library raises a bare one
        raise DataError(f"tokenizer: the byte pairs do not fit their vocabulary ({error})") from None
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    start, end = vocabulary[CLIP_START], vocabulary[CLIP_END]
    tokenizer.post_processor = processors.RobertaProcessing((CLIP_END, end), (CLIP_START, start), False, False)
    return ClipTokenizer(tokenizer_object=tokenizer, **CLIP_SPECIAL)


class XLMRobertaWords:
    """What transformers' converter asks of a tokenizer whose model lies in a file: numbers are XLM-RoBERTa's (arXiv:1911.02116), <s> 0, <pad> 1,
    </s> 2, <unk> 3, then the pieces of the model, <mask> last."""

    add_prefix_space = True

    def __init__(self, file: Path):
        self.vocab_file = str(file)

    def convert_tokens_to_ids(self, token: str) -> int:
        return {"<s>": 0, "</s>": 2}[token]


def from_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a SentencePiece model of kind unigram. DataError where the file holds none."""
    from transformers.convert_slow_tokenizer import XLMRobertaConverter

    try:
        tokenizer = XLMRobertaConverter(XLMRobertaWords(file)).converted()
    except Exception as error:  # protobuf and tokenizers each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"tokenizer: {file} cannot be read as a SentencePiece model of kind unigram ({reason})"
        ) from None
    named = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    )


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


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, kind: TokenizerKind = "wordpiece"
) -> PreTrainedTokenizerFast:
    """One trained on the given texts: the same texts, the same vocabulary."""
    return train_wordpiece(texts, vocab_size) if kind == "wordpiece" else train_byte_bpe(texts, vocab_size)


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte pairs of UTF-8, in the manner of GPT-2: every text of every script can be written, and none loses its capitals or accents.

    A text begins with a space, so that its first word has the pieces of the same word elsewhere.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    words = pre_tokenizers.Split(Regex(BYTE_WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, len(SPECIAL) + len(alphabet)),
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """WordPiece in the manner of bert-base-uncased.

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
