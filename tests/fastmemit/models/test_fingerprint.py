"""The identity of a model changes with every bit, and with nothing else."""

from __future__ import annotations

import copy
import hashlib
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmemit.errors import WrongModel
from fastmemit.models import checksum, fingerprint, tokenizer_fingerprint
from tiny_models import ARCHITECTURES, tiny_model
from tiny_tokenizers import FAST, SENTENCES, tiny_tokenizer

# `fastmemit.models.fingerprint` is the function; the module of that name is here.
fingerprint_module = sys.modules["fastmemit.models.fingerprint"]


def by_hand(data: bytes, words_in_a_block: int) -> str:
    """The digest of a tensor's bytes, in Python's whole numbers."""
    data += bytes(-len(data) % 8)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    sums = b""
    for start in range(0, max(len(words), 1), words_in_a_block):
        mixed = plain = 0
        for place, word in enumerate(words[start : start + words_in_a_block], 1):
            key = place * 0x9E3779B97F4A7C15 % 2**64  # SplitMix64
            key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
            y = word ^ key ^ key >> 31
            signed = y - (y >> 63 << 64)
            mixed, plain = mixed + signed * (signed >> 32), plain + signed
        sums += (mixed % 2**64).to_bytes(8, "little") + (plain % 2**64).to_bytes(8, "little")
    return hashlib.blake2b(sums, digest_size=16).hexdigest()


def test_the_checksum_is_what_its_docstring_says() -> None:
    tensor = torch.tensor([1, 2, -1], dtype=torch.int64)
    assert checksum(tensor) == f"int64[3]:{by_hand(tensor.numpy().tobytes(), 1 << 17)}"
    # An unfinished word is filled up with zeros, and the shape tells it from a finished one.
    short = torch.tensor([[5], [7], [-1]], dtype=torch.int32)
    assert checksum(short) == f"int32[3x1]:{by_hand(short.numpy().tobytes(), 1 << 17)}"
    assert checksum(torch.zeros(0)) == f"float32[0]:{by_hand(b'', 1 << 17)}"


def test_it_does_not_depend_on_threads_or_on_the_path_of_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "_WORDS", 4)
    monkeypatch.setattr(fingerprint_module, "_TOGETHER", 2)
    fingerprint_module._keys.cache_clear()
    threads = torch.get_num_threads()
    try:
        for size in (1, 8, 9, 61, 64):
            tensor = torch.randn(size, generator=torch.Generator().manual_seed(size))
            wanted = f"float32[{size}]:{by_hand(tensor.numpy().tobytes(), 4)}"
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                assert checksum(tensor) == wanted
            words = fingerprint_module._words(tensor)
            with fingerprint_module._Summing() as summing:
                assert torch.equal(summing(words), summing.on_accelerator(words))
    finally:
        torch.set_num_threads(threads)
        fingerprint_module._keys.cache_clear()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]
)
def test_signs_and_places_count_in_every_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(1, 100, (32, 64), generator=generator).float()
    variants = [base, -base]
    for step in (1, 2, 4, 8, 16, 32):  # every, every second... column, row, or element negated
        for start in {0, 1, step - 1}:
            column, row, element = base.clone(), base.clone(), base.clone()
            column[:, start::step] *= -1
            row[start::step] *= -1
            element.view(-1)[start::step] *= -1
            variants += [column, row, element]
    for column in range(64):
        single = base.clone()
        single[:, column] *= -1
        variants.append(single)
    for one, other in ((0, 1), (0, 2), (5, 37), (62, 63)):
        columns, rows, elements = base.clone(), base.clone(), base.clone()
        columns[:, [one, other]] = base[:, [other, one]]
        rows[[one // 2, other // 2]] = base[[other // 2, one // 2]]
        elements[7, [one, other]] = base[7, [other, one]]
        variants += [columns, rows, elements]
    variants += [base.flip(0), base.flip(1), base.roll(1, 0), base.roll(2, 1), base[:, torch.randperm(64)]]
    distinct = {variant.numpy().tobytes(): variant for variant in variants}
    assert len(distinct) > 100
    assert len({checksum(variant.to(dtype)) for variant in distinct.values()}) == len(distinct)


def test_complements_and_equal_changes_of_two_words_count() -> None:
    base = torch.zeros(16, dtype=torch.int64)
    variants = [base]
    for value in (-1, 1, -(2**63), 2**63 - 1, 2**31, 2**32, -(2**32)):
        for places in ((0,), (0, 1), (3, 11), tuple(range(16)), tuple(range(0, 16, 2))):
            other = base.clone()
            other[list(places)] = value
            variants.append(other)
    assert len({checksum(variant) for variant in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_single_bit_counts(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.randn(37, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = checksum(tensor)
    bits = tensor.view(torch.uint8)
    place = data.draw(st.integers(0, len(bits) - 1))
    bits[place] ^= 1 << data.draw(st.integers(0, 7))
    assert checksum(tensor) != before


def test_order_shape_dtype_and_sign_of_zero_count() -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 0.0])
    others = [
        torch.tensor([2.0, 1.0, 3.0, 0.0]),
        torch.tensor([3.0, 0.0, 1.0, 2.0]),
        torch.tensor([1.0, 2.0, 3.0, -0.0]),
        base.reshape(2, 2),
        base.view(torch.int32),
    ]
    assert len({checksum(tensor) for tensor in [base, *others]}) == 6


def test_layout_in_memory_does_not_count() -> None:
    tensor = torch.randn(6, 4)
    assert checksum(tensor.T.contiguous().T) == checksum(tensor)
    shifted = torch.cat([torch.zeros(1), torch.arange(6.0)])[1:]  # begins between two words
    assert checksum(shifted) == checksum(torch.arange(6.0))
    assert checksum(torch.nn.Parameter(tensor)) == checksum(tensor)


def test_the_same_weights_made_again_are_the_same_model() -> None:
    prints = {name: fingerprint(make()) for name, make in ARCHITECTURES.items()}
    assert prints == {name: fingerprint(make()) for name, make in ARCHITECTURES.items()}
    assert len(set(prints.values())) == len(prints)
    assert all(len(text) == 64 for text in prints.values())


def test_one_bit_of_any_parameter_makes_another_model() -> None:
    model = tiny_model("qwen2", num_hidden_layers=1)
    before = fingerprint(model)
    for parameter in model.parameters():
        bits = parameter.data.view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert fingerprint(model) != before
        bits[-1] ^= 1
    assert fingerprint(model) == before


def test_persistent_buffers_count_and_others_do_not() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    model.model.register_buffer("scratch", torch.ones(3), persistent=False)
    assert fingerprint(model) == before
    model.model.register_buffer("kept", torch.ones(3))
    with_buffer = fingerprint(model)
    model.model.kept[0] = 2
    assert len({before, with_buffer, fingerprint(model)}) == 3


def test_a_tied_head_is_read_once() -> None:
    names = [name for name, _ in fingerprint_module.stored_tensors(tiny_model("llama"))]
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert [name for name, _ in fingerprint_module.stored_tensors(tied)] == [
        name for name in names if name != "model.embed_tokens.weight"
    ]
    assert "lm_head.weight" in names


def test_dtype_counts() -> None:
    model = tiny_model("llama")
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) != fingerprint(model)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rms_norm_eps": 0.1},
        {"num_attention_heads": 8},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_fields_of_the_config_that_change_the_function_count(change: dict) -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert fingerprint(model) != before


def test_volatile_fields_do_not_count() -> None:
    model = tiny_model("llama")
    before = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    model.config.attention_dropout = 0.5
    model.config.eos_token_id = 7
    model.config.output_hidden_states = True
    model.config.quantization_config = {"quant_method": "gguf"}
    assert fingerprint(model) == before


def test_both_spellings_of_the_rotary_settings_are_one() -> None:
    essence = fingerprint_module._essence
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    new = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    assert essence(old) == essence(new)
    plain = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None}
    named = {"model_type": "llama", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert essence(plain) == essence(named) != essence(old)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.to("meta")
    with pytest.raises(WrongModel, match="offloading"):
        fingerprint(model)


@pytest.mark.parametrize("kind", [*FAST, "slow_bytes", "slow_words"])
def test_a_tokenizer_is_the_same_before_and_after_use(kind: str) -> None:
    tokenizer = tiny_tokenizer(kind)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == before


def test_tokenizers_that_differ_in_one_rule_are_told_apart() -> None:
    kinds = (*FAST, "slow_bytes", "slow_words")
    assert len({tokenizer_fingerprint(tiny_tokenizer(kind)) for kind in kinds}) == len(kinds)
    more = copy.deepcopy(tiny_tokenizer("slow_bytes"))
    more.add_tokens(["Eiffel"])
    assert tokenizer_fingerprint(more) != tokenizer_fingerprint(tiny_tokenizer("slow_bytes"))
