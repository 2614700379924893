"""Edits that travel, on the command line: adapters, compositions, merged models, the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmemit.delta import Delta
from fastmemit.models import load_model
from fastmemit.sharing import compose
from stand_in_hub import stand_in_hub
from tiny_commands import Place, refused, run


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> tuple[Path, Path]:
    """Two edits of the tiny model by hand, the second of two layers."""
    from fastmemit.models import fingerprint

    folder = tmp_path_factory.mktemp("edits")
    model = load_model(model_folder, device="cpu")[0]
    generator = torch.Generator().manual_seed(0)
    for name, layers in (("a", (1,)), ("b", (0, 1))):
        facts = [{"prompt": "{} is in", "subject": name, "target_new": "Rome"}]
        provenance = {"model": fingerprint(model), "model_name": "tiny-llama", "method": "memit",
                      "requests": facts}  # fmt: skip
        factors = {
            f"model.layers.{layer}.mlp.down_proj.weight": (
                0.1 * torch.randn(32, 2, generator=generator),
                0.1 * torch.randn(64, 2, generator=generator),
            )
            for layer in layers
        }
        Delta(factors, provenance).save(folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def test_several_edits_in_one_model_give_the_same_bits_again(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    merged = place.at / "merged"
    out = run(capsys, "apply", *place.model, "--edit", edits[0], "--edit", edits[1],
              "--save-model", merged)  # fmt: skip
    assert f"edited model saved to {merged}" in out
    expected = load_model(place.model[1], device="cpu")[0]
    for path in edits:
        Delta.load(path).add_to(expected)
    found = load_model(str(merged), device="cpu")[0].state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.state_dict().items())


def test_an_adapter_there_and_back(place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = place.at / "adapter"
    out = run(capsys, "adapter", "export", "--edit", edits[1], "--model", place.model[1], "--out",
              folder)  # fmt: skip
    assert out == f"adapter of rank 2 on 2 modules saved to {folder}\n"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    out = run(capsys, "adapter", "import", *place.model, "--adapter", folder, "--out",
              place.at / "back.st")  # fmt: skip
    assert "adapter on 2 weights of" in out
    assert Delta.load(place.at / "back.st").digest() == Delta.load(edits[1]).digest()
    run(capsys, "apply", *place.model, "--edit", place.at / "back.st")
    said = refused(capsys, place, "adapter", "export", "--edit", edits[1], "--model", place.model[1],
                   "--out", folder)  # fmt: skip
    assert "is not an empty folder" in said
    said = refused(capsys, place, "adapter", "export", "--edit", edits[1], "--out", place.at / "x")
    assert "The model 'tiny-llama' cannot be loaded" in said
    said = refused(capsys, place, "adapter", "import", *place.model, "--adapter", place.at, "--out",
                   place.at / "x")  # fmt: skip
    assert "has no adapter_config.json" in said


def test_an_adapter_of_a_rank_that_servers_take(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    weight = "model.layers.1.mlp.down_proj.weight"
    # Singular values 20, 19, ..., 1 on one weight: what a cut to 16 loses is known.
    values = torch.arange(20.0, 0, -1)
    factors = {weight: (torch.eye(32)[:, :20] * values, torch.eye(64)[:, :20])}
    wide = place.at / "wide.st"
    Delta(factors, Delta.load(edits[0]).provenance).save(wide)
    arguments = ["adapter", "export", "--edit", wide, "--model", place.model[1]]
    out = run(capsys, *arguments, "--out", place.at / "whole")
    assert "adapter of rank 20" in out
    assert "vLLM refuses ranks above 16 as it is: start it with --max-lora-rank 32, or export with --rank 16" in out
    out = run(capsys, *arguments, "--rank", "16", "--out", place.at / "cut")
    lost = ((1 + 4 + 9 + 16) / sum(n * n for n in range(1, 21))) ** 0.5
    assert f"  {weight}: rank 20 -> 16, {lost:.1%} of the change lost\n" in out and "vLLM" not in out
    assert json.loads((place.at / "cut" / "adapter_config.json").read_text())["r"] == 16
    run(capsys, "adapter", "import", *place.model, "--adapter", place.at / "cut", "--out", place.at / "cut.st")
    left, right = Delta.load(place.at / "cut.st").factors[weight]
    expected = torch.zeros(32, 64)
    expected[range(16), range(16)] = values[:16]
    torch.testing.assert_close(left @ right.T, expected)


def test_an_adapter_goes_to_the_hub_with_its_base_model(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, look = place.at / "adapter", place.at / "look"
    run(capsys, "adapter", "export", "--edit", edits[1], "--model", place.model[1], "--out", folder)
    push = ["hub", "push", "--repo", "me/an-adapter", "--adapter", folder, "--dry-run", look]
    out = run(capsys, *push, "--base-model", "me/tiny", "--license", "mit")
    assert "would be pushed; it is in" in out
    assert {path.name for path in look.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = (look / "README.md").read_text()
    assert "library_name: peft" in card and "base_model: me/tiny" in card and "| b is in | Rome |" in card
    assert json.loads((look / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny"
    assert (look / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/tiny"}))
    push[-1] = place.at / "other"
    assert "does not name a base model on the hub; name it with --base-model" in refused(capsys, place, *push)
    push[5] = place.at
    assert "has no adapter_config.json" in refused(capsys, place, *push)


def test_an_edit_whose_facts_are_no_list_counts_none(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = Delta.load(edits[0])
    Delta(found.factors, {**found.provenance, "requests": 3}).save(place.at / "forged.st")
    out = run(capsys, "apply", *place.model, "--edit", place.at / "forged.st", "--edit", edits[1])
    assert "2 edits with 1 fact applied" in out
    said = refused(capsys, place, "compose", "--edit", place.at / "forged.st", "--out",
                   place.at / "x")  # fmt: skip
    assert "requests are no list but 3" in said


def test_own_ranks_and_a_name(place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    both = place.at / "both.st"
    compose([Delta.load(path) for path in edits]).save(both)
    run(capsys, "adapter", "export", "--edit", both, "--model", place.model[1], "--base-model",
        "me/llama", "--own-ranks", "--out", place.at / "adapter")  # fmt: skip
    config = json.loads((place.at / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/llama" and config["r"] == 4
    assert list(config["rank_pattern"].values()) == [2]


def test_compose_and_remove(place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    both, one = place.at / "both.st", place.at / "one.st"
    out = run(capsys, "compose", "--edit", edits[0], "--edit", edits[1], "--out", both)
    digests = re.findall(r"^  ([0-9a-f]{12})  1 fact by memit$", out, re.MULTILINE)
    assert digests == [Delta.load(path).digest()[:12] for path in edits]
    assert out.endswith(f"2 edits on 2 weights saved to {both}\n")
    run(capsys, "apply", *place.model, "--edit", both)
    run(capsys, "compose", "--edit", both, "--remove", digests[0], "--out", one)
    assert Delta.load(one).digest() == Delta.load(edits[1]).digest()
    out = run(capsys, "compose", "--edit", both, "--rank", "3", "--out", one)
    assert re.search(r"layers\.1\.mlp\.down_proj\.weight: rank 4 -> 3, relative error \d", out)
    said = refused(capsys, place, "compose", "--edit", one, "--remove", digests[0], "--out",
                   place.at / "x")  # fmt: skip
    assert "was compressed" in said
    said = refused(capsys, place, "compose", "--edit", both, "--edit", one, "--remove", "0" * 9,
                   "--out", place.at / "x")  # fmt: skip
    assert "pass one --edit" in said


def test_conflicts_are_refused_and_can_be_allowed(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = Delta.load(edits[1])
    facts = [{"prompt": "{} is in", "subject": "A", "target_new": "Oslo"}]
    Delta(other.factors, {**other.provenance, "requests": facts}).save(place.at / "other.st")
    command = ("compose", "--edit", edits[0], "--edit", place.at / "other.st", "--out")
    said = refused(capsys, place, *command, place.at / "x")
    assert "edit 2 with ' Oslo'" in said and "pass --allow-conflicts" in said
    run(capsys, *command, place.at / "x", "--allow-conflicts")


def test_push_and_pull(
    place: Place, edits: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refused(capsys, place, "hub", "push", "--repo", "me/edit", "--edit", edits[0])
    assert "HF_HUB_OFFLINE is set" in said and "--dry-run DIR" in said
    said = refused(capsys, place, "hub", "pull", "--repo", "me/edit", "--out", place.at / "x")
    assert "no copy is kept" in said
    out = run(capsys, "hub", "push", "--repo", "me/edit", "--edit", edits[0], "--license", "mit",
              "--dry-run", place.at / "look")  # fmt: skip
    assert "would be pushed" in out and (place.at / "look" / "README.md").is_file()

    hub = stand_in_hub(monkeypatch, place.at)
    out = run(capsys, "hub", "push", "--repo", "me/edit", "--edit", edits[0])
    assert out == f"{edits[0]} pushed to https://huggingface.co/me/edit\n"
    out = run(capsys, "hub", "pull", "--repo", "me/edit", "--out", place.at / "c.st", *place.model)
    assert "edit with 1 fact of me/edit saved" in out
    assert Delta.load(place.at / "c.st").digest() == Delta.load(edits[0]).digest()
    other = place.other_model()
    hub.at = place.at / "cache"  # where refused() looks at no files
    hub.at.mkdir(exist_ok=True)
    said = refused(capsys, place, "hub", "pull", "--repo", "me/edit", "--out", place.at / "d", *other)
    assert "was made for the model" in said
    said = refused(capsys, place, "hub", "pull", "--repo", "me/edit", *place.model)
    assert "holds no second moments" in said and "--out FILE" in said


def test_statistics_there_and_back(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_hub(monkeypatch, place.at)
    out = run(capsys, "precompute", *place.model, "--corpus", place.corpus, "--multiplier", "2",
              "--layers", "0-1")  # fmt: skip
    home = Path(re.findall(r"^  (/.*\.safetensors)$", out, re.MULTILINE)[0]).parent
    run(capsys, "hub", "push", "--repo", "me/moments", "--statistics", home, "--private")
    model: Any = (*place.model[:3], place.at / "elsewhere", "--quiet")
    out = run(capsys, "hub", "pull", "--repo", "me/moments", *model)
    assert "second moments of 2 layers: corpus corpus.jsonl, multiplier 2, 128 keys" in out
    out = run(capsys, "edit", *model, "--set", "layers=0-1", "--set", "steps=2", "--facts",
              place.requests, "--out", place.at / "edit.st")  # fmt: skip
    assert "128 keys (stored)" in out
