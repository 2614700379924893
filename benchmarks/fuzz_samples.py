"""Small valid data in the formats that people bring, for the fuzz of their readers."""

from __future__ import annotations

import json
from typing import Any

from fastmemit.experiments.results import with_defaults
from tiny_sweeps import SWEEP
from tiny_tokenizers import SENTENCES

_MEMIT = with_defaults("memit", {"layers": [0, 1], "steps": 3})
HEADER = {**SWEEP, "methods": json.loads(json.dumps({"memit": _MEMIT}))}

UNEDITED = {
    "fingerprint": "f" * 64,
    "cases": [3, 5],
    "scores": [{"case_id": 3, "es": 0.0, "ps": None}, {"case_id": 5, "es": 1.0, "ps": 0.5}],
}


def documents() -> list[Any]:
    return [*({"text": text, "id": i} for i, text in enumerate(SENTENCES)), "plain text"]


def requests() -> list[Any]:
    return [
        {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"},
        {"prompt": "Italy lies in", "subject": "Italy", "target_new": {"str": "Asia"}},
        {"requested_rewrite": {"prompt": "{} is", "subject": "x", "target": "y"}},
    ]


def counterfact() -> list[Any]:
    return [
        {
            "case_id": case,
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is",
                "subject": f"Danielle {case}",
                "target_new": {"str": "English"},
                "target_true": {"str": "French"},
                "relation_id": "P103",
            },
            "paraphrase_prompts": ["She speaks", "Her tongue is"],
            "neighborhood_prompts": ["L\u00e9on speaks"],
            "attribute_prompts": ["J. R. speaks"],
            "generation_prompts": ["Danielle was born"],
        }
        for case in range(3)
    ]


def flat() -> list[Any]:
    return [
        {
            "case_id": case,
            "subject": "Italy",
            "prompt": "{} lies in",
            "target_new": "Asia",
            "ground_truth": "Europe",
            "rephrase_prompt": "Italy. Where is it?",
            "locality_prompt": "France lies in",
            "locality_ground_truth": "Europe",
        }
        for case in range(3)
    ]


def zsre() -> list[Any]:
    return [
        {
            "subject": f"Tower {case}",
            "src": f"In which city is Tower {case}?",
            "rephrase": f"What city has Tower {case}?",
            "alt": "Rome",
            "answers": ["Paris", "City of Paris"],
            "loc": "nq question: who wrote the odyssey",
            "loc_ans": "Homer",
        }
        for case in range(3)
    ]
