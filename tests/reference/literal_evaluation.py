"""CounterFact scored literally: one record at a time, every answer a sequence of its own.

The reference for `fastmemit.evaluation`: the unmodified model, one padded batch of a record's
prompts with both answers, logits at every position.  Nothing is shared or sorted over records.
"""

from __future__ import annotations

import torch


def literal_costs(model, tokenizer, prompts, answers):
    """Per prompt and answer: (mean -log p per token, whether every token is the most probable)."""
    rows, counts = [], []
    for prompt in prompts:
        for answer in answers:
            full = tokenizer(prompt + answer, return_offsets_mapping=True)
            rows.append(full["input_ids"])
            counts.append(sum(1 for _, end in full["offset_mapping"] if end > len(prompt)))
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    found = []
    for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
        cost, exact = 0.0, True
        for position in range(len(row) - n, len(row)):
            read = logits[i, position - 1].float()
            cost += -torch.log_softmax(read, dim=0)[row[position]].item() / n
            exact = exact and int(read.argmax()) == row[position]
        found.append((cost, exact))
    step = len(answers)
    return [found[start : start + step] for start in range(0, len(found), step)]


def literal_record(model, tokenizer, record):
    """A record's costs: one list each for rewrite, paraphrases and neighbourhood prompts.

    An item is ((cost, exact) of the new answer, (cost, exact) of the true one).
    """
    request = record.request
    answers = [" " + request.target_new.strip(), " " + request.target_true.strip()]
    rewrite = request.prompt.replace("{}", request.subject)
    prompts = [rewrite, *record.paraphrases, *record.neighbourhood]
    costs = literal_costs(model, tokenizer, prompts, answers)
    split = 1 + len(record.paraphrases)
    return costs[:1], costs[1:split], costs[split:]
