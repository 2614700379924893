"""Target vectors computed literally: one request at a time, every token through every block.

The reference for `fastmemit.targets`: full forwards of the unmodified model, the change added by a
hook, logits everywhere, `torch.optim.Adam`, or the rule of "rotate" written out.  Nothing is shared,
cached or batched over requests.
"""

from __future__ import annotations

import torch


def _output(out):
    return out[0] if isinstance(out, tuple) else out


def literal_target(model, tokenizer, block, request, contexts, settings, module=None):
    """(target, v0, losses) of one request.

    `block` is the module whose output takes the change; `module`, if given, takes its place (the edited projection, for
    ROME).
    """
    site = module if module is not None else block
    ending = " " + request.target_new.strip()
    before, after = request.prompt.split("{}")
    texts, subjects = [], []
    for prefix in contexts:
        texts.append(prefix + before + request.subject + after)
        subjects.append(len(prefix) + len(before) + len(request.subject))
    rows, lookups, n_target = [], [], []
    for text, end in zip(texts, subjects, strict=True):
        full = tokenizer(text + ending, return_offsets_mapping=True)
        spans = full["offset_mapping"]
        target = sum(1 for s, e in spans if e > len(text))
        rows.append(full["input_ids"])
        n_target.append(target)
        lookups.append(max(i for i, (s, e) in enumerate(spans) if s < end and e > 0 and e > s))
    kl_full = tokenizer(request.subject + " is a", return_offsets_mapping=True)
    end = len(request.subject)
    kl_lookup = max(i for i, (s, e) in enumerate(kl_full["offset_mapping"]) if s < end and e > s)
    inputs = [row[:-1] for row in rows] + [kl_full["input_ids"]]
    lookups.append(kl_lookup)
    width = max(map(len, inputs))
    ids = torch.zeros(len(inputs), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(inputs):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1

    d = model.get_input_embeddings().weight.shape[1]
    d = getattr(model.config, "hidden_size", d)
    delta = torch.zeros(d, requires_grad=True)
    start = None

    def add(_module, _args, out):
        nonlocal start
        hidden = _output(out)
        shape = hidden.shape
        tokens = hidden.reshape(len(inputs), width, -1)
        if start is None:
            start = tokens[0, lookups[0]].detach().float().clone()
        changed = tokens.clone()
        for i, index in enumerate(lookups):
            changed[i, index] = tokens[i, index] + delta.to(tokens.dtype)
        changed = changed.reshape(shape)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
    losses, kl_start = [], None
    velocity, squares, in_a_row = torch.zeros(d), torch.zeros(d), 0
    turn = max(1, len(rows) - 1) if settings.optimiser == "rotate" else 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for step in range(settings.steps):
        optimiser.zero_grad()
        handle = site.register_forward_hook(add)
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        finally:
            handle.remove()
        log_p = torch.log_softmax(logits, dim=-1)
        nll, told = 0.0, True
        read = list(range(len(rows)))
        if settings.optimiser == "rotate" and len(rows) > 1:
            read = [0, 1 + step % (len(rows) - 1)]
        for i in read:
            row, n = rows[i], n_target[i]
            positions = range(len(row) - n, len(row))
            told = told and all(log_p[i, p - 1].argmax().item() == row[p] for p in positions)
            nll = nll - sum(log_p[i, p - 1, row[p]] for p in positions) / n / len(read)
        log_q = log_p[-1, kl_lookup]
        if kl_start is None:
            kl_start = log_q.detach().clone()
        kl = torch.sum(log_q.exp() * (log_q - kl_start))
        decay = settings.weight_decay * (delta.norm() / start.norm() ** 2)
        loss = nll + settings.kl_factor * kl + decay
        losses.append(loss.item())
        judged = nll if settings.stop == "nll" else loss
        enough = told if settings.stop == "most-probable" else judged.item() < settings.early_stop
        in_a_row = in_a_row + 1 if enough else 0
        if in_a_row == turn or step == settings.steps - 1:
            break
        loss.backward()
        if settings.optimiser == "adam":
            optimiser.step()
        else:
            unit = delta.grad / delta.grad.norm()
            velocity = 0.7 * velocity - unit
            squares = 0.9 * squares + 0.1 * unit**2
            direction = velocity / (torch.sqrt(squares / (1 - 0.9 ** (step + 1))) + 1e-8)
            size = settings.rho * settings.clamp * start.norm() * max(1 - torch.exp(-2 * nll.detach()), 0.1)
            with torch.no_grad():
                delta += size * direction / direction.norm()
        limit = settings.clamp * start.norm()
        if delta.norm() > limit:
            with torch.no_grad():
                delta[...] = delta * limit / delta.norm()
    return (start + delta).detach(), start, losses
