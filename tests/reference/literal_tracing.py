"""Causal tracing computed literally: one fact, one state, one noise sample at a time.

The reference for `fastmemit.tracing`: full forwards of the unmodified model without padding, the
noise and the restored states put in by hooks, logits everywhere.  Nothing is shared or cached.
"""

from __future__ import annotations

import torch


def _hidden(out):
    return out[0] if isinstance(out, tuple) else out


def _answer_probability(model, ids, answer):
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return torch.softmax(logits[0, -1].float(), dim=0)[answer].item()


@torch.no_grad()
def literal_effects(model, modules, ids, subject, answer, noise, windows, positions=None, layers=None):
    """(p clean, mean p corrupted, {(kind, position, layer): indirect effect}) of one fact.

    `modules` is kind -> the module of each layer; `subject` is the index of the subject's first token; `noise` is
    (samples, subject tokens, width); `windows` is kind -> layer -> the layers that are put back together; `positions`
    (all from the subject on) and `layers` (all) say which effects are wanted.
    """
    width = noise.shape[1]
    clean_values = {}

    def keep(name):
        def hook(_module, _args, out):
            hidden = _hidden(out)
            clean_values[name] = hidden.reshape(len(ids), -1).clone()

        return hook

    handles = [
        module.register_forward_hook(keep((kind, layer)))
        for kind, layers in modules.items()
        for layer, module in enumerate(layers)
    ]
    clean = _answer_probability(model, ids, answer)
    for handle in handles:
        handle.remove()

    def corrupt(sample):
        def hook(_module, _args, out):
            changed = out.clone()
            changed[0, subject : subject + width] += sample
            return changed

        return model.get_input_embeddings().register_forward_hook(hook)

    def restore(name, position):
        def hook(_module, _args, out):
            hidden = _hidden(out)
            changed = hidden.reshape(len(ids), -1).clone()
            changed[position] = clean_values[name][position]
            changed = changed.reshape(hidden.shape)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        kind, layer = name
        return modules[kind][layer].register_forward_hook(hook)

    def run(kind=None, position=None, layers=()):
        total = 0.0
        for sample in noise:
            handles = [corrupt(sample)]
            handles += [restore((kind, layer), position) for layer in layers]
            total += _answer_probability(model, ids, answer)
            for handle in handles:
                handle.remove()
        return total / len(noise)

    corrupted = run()
    effects = {
        (kind, position, layer): run(kind, position, windows[kind][layer]) - corrupted
        for kind in modules
        for position in positions or range(subject, len(ids))
        for layer in layers or range(len(modules[kind]))
    }
    return clean, corrupted, effects
