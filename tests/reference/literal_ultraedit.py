"""UltraEdit (arXiv 2505.14679) written out: one fact at a time, every token so far at hand, NumPy in float64."""

from __future__ import annotations

import numpy as np
import torch


def features(model, tokenizer, modules, request, tokens="answer"):
    """For each module what enters it (n, d_k), and the gradient of the answer's mean cost by its output (n, d)."""
    before, after = request.prompt.split("{}")
    prompt = before + request.subject + after
    full = tokenizer(prompt + " " + request.target_new.strip(), return_offsets_mapping=True)
    ids = full["input_ids"]
    first = min(i for i, (_, end) in enumerate(full["offset_mapping"]) if end > len(prompt))
    told = range(first - 1, len(ids) - 1)  # the places at which the answer's tokens are predicted
    entered, given = {}, {}

    def note(number):
        def hook(_module, args, out):
            entered[number] = args[0].detach().reshape(len(ids) - 1, -1)
            given[number] = out
            if not out.requires_grad:
                given[number] = out.clone().requires_grad_()
            given[number].retain_grad()
            return given[number]

        return hook

    handles = [module.register_forward_hook(note(number)) for number, module in enumerate(modules)]
    with torch.enable_grad():
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        loss = -sum(torch.log_softmax(logits[place], -1)[ids[place + 1]] for place in told) / len(told)
        loss.backward()
    for handle in handles:
        handle.remove()
    read = list(told) if tokens == "answer" else list(range(len(ids) - 1))
    model.zero_grad()
    return [
        (entered[n][read].numpy(), given[n].grad.reshape(len(ids) - 1, -1)[read].numpy()) for n in range(len(modules))
    ]


def normalised(z, seen):
    """Less the mean of all that was seen, in standard deviations (of n - 1); 0 where nothing deviates."""
    deviation = seen.std(0, ddof=1)
    return np.where(deviation > 0, z - seen.mean(0), 0) / np.where(deviation > 0, deviation, 1)


def change(H, G, earlier, eta):
    """Delta (d, d_k) for keys H (n, d_k) and gradients G (n, d); `earlier` (m, d_k + d) was edited before."""
    z = np.concatenate([H, G], 1)
    z = normalised(z, np.concatenate([earlier, z]))
    h, g = z[:, : H.shape[1]], z[:, H.shape[1] :]
    V = np.array([-eta * (a @ a) * b for a, b in zip(h, g, strict=True)])
    return (np.linalg.inv(H.T @ H + np.eye(H.shape[1])) @ H.T @ V).T
