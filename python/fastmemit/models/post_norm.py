"""Blocks that normalise the MLP's result before they add it to the stream (Gemma 2 and 3, OLMo 2).

The edit changes what goes into that norm, the target says what shall come out.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

# Attributes of a block, not names of models: what the published blocks call this norm.
_NAMES = ("post_feedforward_layernorm", "post_mlp_layernorm")


def find_post_norm(block: nn.Module) -> nn.Module | None:
    """The norm that `block` applies to the MLP's result, or None."""
    for name in _NAMES:
        norm = getattr(block, name, None)
        if isinstance(norm, nn.Module):
            return norm
    return None


@torch.no_grad()
def through_post_norm(
    norm: nn.Module,
    output: torch.Tensor,  # (B, d)
    residual: torch.Tensor,  # (B, d)
) -> torch.Tensor:  # (B, d)
    """The change of a norm's input y that turns its output N(y) towards N(y) + residual.

    With N(y) = g y / rms(y), the input y' = rms(y) (N(y) + r) / g = y + rms(y) r / g has
    N(y') = (N(y) + r) rms(y) / rms(y'): its direction is exactly the wanted one.  Its length is not
    free, since a norm fixes the length of what it returns, so a residual that is large against N(y)
    is reached in part.  Coordinates whose gain g is zero let nothing through and are left alone.

    Args:
        norm: The norm; gain and epsilon are read by evaluating it, whatever its class.
        output: y, the projection's output.
        residual: r, the wanted change behind the norm.

    Returns:
        y' - y, in the dtype of `residual`.
    """
    # In float32 and on a copy: bfloat16 gains would round the very quantities that are read here.
    norm = copy.deepcopy(norm).float()
    y = output.float()
    d = y.shape[-1]
    # +-16 in turn has no mean and a root mean square that any epsilon is negligible against.
    signs = torch.ones(d, device=y.device)
    signs[1::2] = -1
    shift = norm(torch.zeros(1, d, device=y.device))
    gain = (norm(16 * signs[None]) - shift) * signs  # (1, d)
    scaled = y * gain
    # N(y) - shift = scaled / rms; solved for rms in least squares, which includes the epsilon.
    rms = scaled.square().sum(-1, keepdim=True) / (
        (scaled * (norm(y) - shift)).sum(-1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    )
    open_ = gain.abs() > 1e-6 * gain.abs().max()
    safe = torch.where(open_, gain, torch.ones_like(gain))
    return torch.where(open_, rms * residual.float() / safe, 0.0).to(residual.dtype)
