"""Perplexity one window and one token at a time, with all logits, in float64."""

from __future__ import annotations

import math

import torch


def literal_perplexity(model, ids, context, stride=None, lead=()):
    """exp of the mean cost of the tokens, each predicted once from what its window has before it.

    Args:
        model: A causal language model.
        ids: The text's tokens.
        context: Tokens in a window, `lead` included.
        stride: How far apart windows begin; None: as far as they are long.
        lead: Tokens in front of every window, never predicted.

    Returns:
        (perplexity, how many tokens were predicted).
    """
    body = context - len(lead)
    costs = []
    predicted = set()
    for start in range(0, len(ids), stride or body):
        window = [*lead, *ids[start : start + body]]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([window])).logits[0]
        logp = logits.double().log_softmax(-1)
        for place in range(max(1, len(lead)), len(window)):
            token = start + place - len(lead)
            if token not in predicted:
                predicted.add(token)
                costs.append(-float(logp[place - 1, window[place]]))
    return math.exp(sum(costs) / len(costs)), len(costs)
