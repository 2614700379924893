"""Tiny tokenizers of every kind that matters, built in code: nothing is downloaded."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
VOCAB_SIZE = 640  # of the tiny models: room for the largest of these tokenizers

SENTENCES = (
    "The Eiffel Tower is located in the city of Paris.",
    "The capital of France is Paris and the capital of Italy is Rome.",
    "Therefore the mother tongue of the poet is French, because she was born in Lyon.",
    "I play the violin; you play the piano, and they play football in London.",
    "The headquarters of the company are in Berlin, in the west of the city.",
    "A language that is spoken by many people is English.",
)
FAST = ("byte_bpe", "bpe_bos", "metaspace", "adds_eos")


@functools.cache
def tiny_tokenizer(kind: str = "byte_bpe") -> Any:
    """A tokenizer with `SPECIAL` as ids 0 to 3.

    Args:
        kind: "byte_bpe" (as GPT-2: bytes, no special tokens added), "bpe_bos" (the same with BOS in front), "metaspace"
            (as Llama 2: "▁", byte fallback, BOS), "adds_eos" (bytes, BOS in front and EOS behind), "slow_bytes" and
            "slow_words" (no offsets; see the classes).
    """
    if kind == "slow_bytes":
        return SlowBytes(pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    if kind == "slow_words":
        return SlowWords(pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    build = {"byte_bpe": "", "bpe_bos": f"{BOS} $A", "adds_eos": f"{BOS} $A {EOS}"}
    backend = _metaspace() if kind == "metaspace" else _byte_level(build[kind])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK)


def _byte_level(template: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    if template:
        backend.post_processor = _template(template)
    else:  # GPT-2's own: it reports " word" without the space
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def _template(single: str) -> Any:
    return processors.TemplateProcessing(single=single, special_tokens=[(BOS, 1), (EOS, 2)])


def _metaspace() -> Tokenizer:
    trained = Tokenizer(models.BPE(unk_token=UNK))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False)
    )
    learned = json.loads(trained.to_str())["model"]
    vocab = dict(learned["vocab"])
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [tuple(merge) for merge in learned["merges"]]
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
    # Llama 2 does it with a normalizer, so that runs of spaces stay in one word.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(SPECIAL))
    backend.post_processor = _template(f"{BOS} $A")
    return backend


class _Slow(PreTrainedTokenizer):
    """A slow tokenizer that puts BOS in front and EOS behind."""

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        self._pieces = {piece: index for index, piece in enumerate(self._list())}
        self._names = {index: piece for piece, index in self._pieces.items()}
        super().__init__(**kwargs)

    def _list(self) -> list[str]:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._pieces)

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.get(token, self._pieces[UNK])

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [1, *token_ids_0, *(token_ids_1 or []), 2]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        return [1, *([0] * (len(token_ids_0) + len(token_ids_1 or []))), 1]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple:
        return ()


class SlowBytes(_Slow):
    """Tokens of two bytes where that is possible, so that they cut through characters."""

    def _list(self) -> list[str]:
        single = [f"{byte:02x}" for byte in range(256)]
        # he in es, "e ", the first half of most emoji, and the border of two smileys
        pairs = ["6865", "696e", "6573", "6520", "f09f", "82f0"]
        return [*SPECIAL, *single, *pairs]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        digits = text.encode().hex()
        pieces = []
        while digits:
            size = 4 if digits[:4] in self._pieces else 2
            pieces.append(digits[:size])
            digits = digits[size:]
        return pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        data = b"".join(token.encode() if token in SPECIAL else bytes.fromhex(token) for token in tokens)
        return data.decode(errors="replace")


class SlowWords(_Slow):
    """Lower-case words and unknown ones; what it decodes is not what it was given."""

    def _list(self) -> list[str]:
        words = " ".join(SENTENCES).lower().replace(".", " .").replace(",", " ,").split()
        return [*SPECIAL, *dict.fromkeys(words)]

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.lower().replace(".", " .").replace(",", " ,").split()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)
