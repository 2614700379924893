"""Where a decoder keeps its blocks and the projection to edit, read from its structure.

Nothing here looks at a model's name: the blocks are a list as long as the config says, and the
edited projection is the linear map of a block that leads back to the hidden size from outside the
attention.  Where this leaves no or several answers the user names the module.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from fastmemit.errors import UnknownArchitecture

EXAMPLE = 'name the one to edit, for example --module "model.layers.{}.mlp.down_proj"'


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder; that of the whole model where there is only one.

    Raises:
        UnknownArchitecture: The model has no config, or is an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnknownArchitecture(
            f"{type(model).__name__} has no config; give a causal language model of transformers."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnknownArchitecture(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be edited."
        )
    read = getattr(config, "get_text_config", None)
    return read(decoder=True) if callable(read) else config


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear map, quantised ones included; None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.nf)
    found = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(found[0], int) and isinstance(found[1], int):
        return found[0], found[1]
    return None


def find_blocks(model: nn.Module) -> str:
    """The name of the list that holds the decoder's blocks, such as ``model.layers``.

    Raises:
        UnknownArchitecture: No list, or several, are as long as the config's number of layers.
    """
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(depth, int) or not isinstance(width, int):
        raise UnknownArchitecture(
            f"The config of {type(model).__name__} has no num_hidden_layers or no hidden_size; "
            f"{EXAMPLE}."
        )
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(block) for block in module}) == 1
        and any((linear_shape(part) or (0, 0))[1] == width for part in module[0].modules())
    ]
    if len(names) > 1:  # a vision or audio tower can be as deep as the text decoder
        decoder = getattr(model, "get_decoder", lambda: None)()
        if isinstance(decoder, nn.Module) and decoder is not model:
            inside = {id(module) for module in decoder.modules()}
            names = [name for name in names if id(model.get_submodule(name)) in inside]
    # Lists inside a block of the list (expert lists as long as the model is deep) do not count.
    names = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
    if len(names) != 1:
        found = ", ".join(names) if names else "none"
        raise UnknownArchitecture(
            f"The {depth} blocks of {type(model).__name__} cannot be told apart "
            f"(lists of that length: {found}); {EXAMPLE}."
        )
    return names[0]


def find_projection(block: nn.Module, width: int, inner: int | None) -> str:
    """The name, inside `block`, of the projection that writes the MLP's result.

    Args:
        block: One decoder block.
        width: The hidden size d: the projection's output.
        inner: The MLP's width as the config states it, to choose between candidates; or None.

    Raises:
        UnknownArchitecture: No module answers to this, or several do (a mixture of experts).
    """
    shapes = {
        name: shape
        for name, module in block.named_modules()
        if (shape := linear_shape(module)) is not None and not _in_attention(block, name)
    }
    names = [name for name, shape in shapes.items() if shape[1] == width]
    stacked = [
        name
        for name, parameter in block.named_parameters()
        if parameter.ndim == 3 and not _in_attention(block, name)
    ]
    if stacked:
        _refuse(block, names, f"it keeps experts stacked in {', '.join(stacked)}")
    fitting = [name for name in names if shapes[name][0] == inner]
    names = fitting or names
    if not names:
        _refuse(block, [], f"no linear map outside its attention has {width} outputs")
    parents = {name.rpartition(".")[0] for name in names}
    listed = isinstance(block.get_submodule(min(parents)), nn.ModuleList)  # experts, or stages
    if len(parents) > 1 or (listed and len(names) > 1):
        _refuse(block, names, f"{len(names)} modules of it could be the one")
    return names[-1]  # an MLP as wide as the model itself: the last map is the one that writes


def _in_attention(block: nn.Module, name: str) -> bool:
    """Whether `name` lies inside an attention module of `block`."""
    module = block
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        words = f"{part} {type(module).__name__}".lower()
        if "attn" in words or "attention" in words:
            return True
    return False


def _refuse(block: nn.Module, names: list[str], why: str) -> NoReturn:
    found = names or [n for n, module in block.named_modules() if linear_shape(module) is not None]
    shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
    raise UnknownArchitecture(
        f"The projection to edit in {type(block).__name__} is not clear, for {why} "
        f"(found {shown or 'no linear map at all'}); {EXAMPLE}."
    )
