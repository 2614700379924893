from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

from fastcov import bucket, collect_moments, throughput
from fastcov.throughput import Throughput, measured_peak
from reference.tiny import Tiny, paths
from tiny_models import D_K, VOCAB_SIZE, D, tiny_model

CPU = torch.device("cpu")


def triangle(keys, d_k):
    return keys * d_k * (d_k + 1)


def test_operations_of_a_small_model_by_hand():
    meter = Throughput(peak=1e9)
    # 7 tokens in a batch of 8; one block whole (6 x 8 up, 8 x 6 down), then up of the second.
    batches = bucket([[1, 2, 3, 4], [5, 6, 7]], 8, max_padding=0.9)
    got = collect_moments(Tiny(), paths(0, 1), batches, None, throughput=meter)
    assert [moment.count for moment in got.values()] == [7, 7]
    forward = 2 * (6 * 8 + 8 * 6 + 6 * 8)  # for a token
    assert meter.flops == 7 * forward + 2 * triangle(7, 8)
    assert (meter.keys, meter.modules, meter.peak) == (7, 2, 1e9)


def test_attention_counts_pairs_of_real_tokens_alone():
    (padded,) = bucket([[1, 2, 3, 4], [5, 6]], 100, max_padding=0.9)
    assert throughput._pairs(padded, 2, 4) == 4 * 5 / 2 + 2 * 3 / 2
    assert throughput._pairs({"input_ids": padded["input_ids"]}, 2, 4) == 2 * 4 * 5 / 2


def test_budgets_that_differ_count_what_each_module_took():
    meter = Throughput(peak=1e9)
    first, second = paths(0, 1)
    batches = bucket([[1, 2, 3, 4]] * 5, 8)
    collect_moments(Tiny(), [first, second], batches, {first: 3, second: 10}, throughput=meter)
    forward = 2 * (6 * 8 + 8 * 6 + 6 * 8)
    # The second batch of 8 tokens was the last, and all of it went through the model.
    assert meter.flops == 16 * forward + triangle(3, 8) + triangle(10, 8)
    assert meter.keys == 10


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_of_a_llama_by_hand(attention):
    model = tiny_model("llama", attn_implementation=attention)
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    meter = Throughput(peak=1e9)
    shapes = [(3, 8), (2, 5)]  # the second batch is reckoned from the first
    documents = [list(range(1, 1 + length)) for n, length in shapes for _ in range(n)]
    collect_moments(model, names, bucket(documents, 24, max_padding=0), None, throughput=meter)
    heads, key_heads, inner = 4, 2, D // 4
    mixed = D * heads * inner + 2 * D * key_heads * inner + heads * inner * D  # q, k and v, out
    block = mixed + 3 * D * D_K
    tokens = sum(n * length for n, length in shapes)
    pairs = sum(n * length * (length + 1) // 2 for n, length in shapes)
    forward = tokens * 2 * (block + block - D * D_K)  # the last projection does not run
    attended = pairs * 2 * 2 * heads * inner * 2  # two blocks, scores and their use
    rotary = forward * 0.01  # angles of positions, which are products as well
    wanted = forward + attended + 2 * triangle(tokens, D_K)
    assert wanted <= meter.flops <= wanted + rotary
    assert VOCAB_SIZE * D * tokens * 2 > rotary  # logits would be seen


@pytest.mark.real
@pytest.mark.slow
def test_operations_of_smollm2_by_hand(smollm2):
    model, _ = smollm2
    meter = Throughput(peak=1e9)
    names = [f"model.layers.{i}.mlp.down_proj" for i in (1, 3)]
    documents = [[100 + i for i in range(64)]] * 4
    collect_moments(model, names, bucket(documents, 256), None, throughput=meter)
    d, d_k, heads, key_heads, inner = 576, 1536, 9, 3, 64
    mixed = d * heads * inner + 2 * d * key_heads * inner + heads * inner * d
    forward = 2 * 256 * (4 * (mixed + 3 * d * d_k) - d * d_k)
    attended = 4 * 64 * 65 // 2 * 2 * 2 * heads * inner * 4  # four blocks
    wanted = forward + attended + 2 * triangle(256, d_k)
    assert meter.flops == pytest.approx(wanted, rel=1e-3)


def test_the_sums_are_the_same_bit_for_bit_with_and_without():
    model = tiny_model("llama")
    names = [f"model.layers.{i}.mlp.down_proj" for i in (0, 2)]
    batches = list(bucket([list(range(1, n)) for n in range(2, 30)], 64))
    plain = collect_moments(model, names, batches, 200)
    measured = collect_moments(model, names, batches, 200, throughput=Throughput())
    for name in names:
        assert torch.equal(plain[name].sum, measured[name].sum)


def test_rates_by_hand(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Throughput(peak=1000.0)
    assert (meter.seconds, meter.tokens_per_second, meter.limit, meter.share) == (0, 0, None, None)
    steps = []

    def progress(taken):
        now[0] += 2.0
        steps.append((taken, meter.keys, meter.seconds, meter.tokens_per_second))

    down = nn.Linear(4, 1)
    model = nn.Sequential()
    model.forward = lambda x: down(x)
    model.add_module("down", down)
    batches = [{"x": torch.ones(1, 5, 4)}] * 2
    collect_moments(model, ["down"], batches, None, progress=progress, throughput=meter)
    assert steps == [(5, 5, 2.0, 2.5), (5, 10, 4.0, 2.5)]
    now[0] += 1000.0  # the time was taken when it ended
    assert meter.flops == triangle(10, 4) == 200  # nothing before the projection
    assert (meter.limit, meter.share) == (50.0, 0.05)  # 20 operations a key, 1000 a second
    assert meter.rate() == "2 tokens/s"
    line = "10 keys of 1 layer in 4.0 s: 2 tokens/s, 5 % of what this machine's arithmetic allows"
    assert str(meter) == line


def test_a_machine_whose_peak_cannot_be_measured_is_no_failure(monkeypatch, caplog):
    def fails(dtype, device):
        raise RuntimeError("no products of this dtype")

    monkeypatch.setattr(throughput, "measured_peak", fails)
    meter = Throughput()
    with caplog.at_level(logging.WARNING):
        collect_moments(Tiny(), paths(0), bucket([[1, 2, 3]], 8), None, throughput=meter)
    assert meter.peak is None and meter.share is None and "no products" in caplog.text
    assert "the machine's limit was not measured" in str(meter) and "%" not in meter.rate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_peak_is_no_less_than_a_product_just_timed(dtype):
    square = torch.ones(512, 512, dtype=dtype)
    peak = measured_peak(dtype, CPU)
    slowest = max(throughput._timed(square) for _ in range(3))
    assert peak > 0.2 * 2 * 512**3 / slowest  # a fifth: other programs may have run in between


def test_the_dtype_of_the_peak_is_that_of_the_model(monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "measured_peak", lambda *args: asked.append(args) or 1.0)
    model = Tiny(dtype=torch.bfloat16)
    collect_moments(model, paths(0), bucket([[1, 2, 3]], 8), None, throughput=Throughput())
    assert asked == [(torch.bfloat16, CPU)]


def test_an_error_in_the_first_batch_leaves_no_counter_behind():
    meter = Throughput(peak=1.0)
    with pytest.raises(IndexError):
        collect_moments(Tiny(), paths(0), bucket([[99]], 8), None, throughput=meter)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.nn.modules.module._global_forward_hooks
