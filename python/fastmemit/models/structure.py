"""Where a decoder keeps its blocks and the projection to edit, read from its structure.

Nothing here looks at a model's name: the blocks are a list as long as the config says, and the edited projection is the
linear map of a block that leads back to the hidden size from outside what mixes tokens (attention, a convolution or
recurrence). Where this leaves no or several answers the user names the module.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fastmemit.errors import UnknownArchitecture
from fastmemit.models.adapter import ModelAdapter, linear_shape
from fastmemit.models.running import text_config

_INNER_FIELDS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, PEFT or a data-parallel module; UnknownArchitecture if a part is compiled."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif callable(getattr(model, "get_base_model", None)):  # PEFT
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                raise UnknownArchitecture(
                    f"{type(model).__name__} learns a prompt in front of each text, which an edit "
                    "of the model behind it would not see; give the base model."
                )
            model = model.get_base_model()
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                raise UnknownArchitecture(
                    f"{name or type(model).__name__} was compiled in place, so nothing inside it can be read or "
                    "replaced; give the model before its parts are compiled, or torch.compile(model) of the whole."
                )
    return model


def find_adapter(model: nn.Module, module: str | None = None) -> ModelAdapter:
    """The adapter of a model, found by the model's structure.

    Args:
        model: A causal language model; what torch.compile, PEFT or a parallel wrapper puts around one is taken off, so
            that weights have the names that the model itself gives them.
        module: The projection to edit with ``{}`` for the layer, where its structure leaves doubt.

    Raises:
        UnknownArchitecture: The blocks or the projection cannot be told; the message lists what was found. Or `module`
            names nothing that can be edited.
    """
    model = unwrapped(model)
    return ModelAdapter(model, find_template(model) if module is None else _checked(model, module))


def _checked(model: nn.Module, module: str) -> str:
    """`module`, if it names a linear map in at least one block."""
    exist = linear_maps(model)
    if module.count("{}") != 1:
        raise UnknownArchitecture(f"The module {module!r} must contain exactly one {{}} for the layer; {exist}.")
    prefix, _, rest = module.partition(".{}.")
    try:
        blocks: nn.Module | None = model.get_submodule(prefix) if rest else None
    except AttributeError:
        blocks = None
    linear = {name for name, part in model.named_modules() if linear_shape(part) is not None}
    if isinstance(blocks, nn.ModuleList) and any(
        module.replace("{}", str(layer)) in linear for layer in range(len(blocks))
    ):
        return module
    raise UnknownArchitecture(f"The module {module!r} leads to no linear map; {exist}.")


def find_template(model: nn.Module) -> str:
    """The edited projection, ``model.layers.{}.mlp.down_proj``, of blocks that have it; else UnknownArchitecture."""
    config = text_config(model)
    path = find_blocks(model)
    stated = (getattr(config, field, None) for field in _INNER_FIELDS)
    inner = next((value for value in stated if value), None)  # Gemma 3n states one for each block
    widths = {inner} if isinstance(inner, int) else set(inner or ())
    found: dict[str, None] = {}
    refused: UnknownArchitecture | None = None
    for block in model.get_submodule(path).children():
        try:
            found[find_projection(block, config.hidden_size, widths, path)] = None
        except UnknownArchitecture as error:
            refused = refused or error
    if len(found) == 1:
        return f"{path}.{{}}.{next(iter(found))}"
    if refused is not None and not found:
        raise refused
    raise UnknownArchitecture(
        f"The blocks of {type(model).__name__} differ: their projections are {', '.join(found)}; "
        f"{_advice(path, next(iter(found)))}."
    )


def find_blocks(model: nn.Module) -> str:
    """The list of the decoder's blocks, such as ``model.layers``; UnknownArchitecture if none or several could be."""
    config = text_config(model)
    depth = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    advice = f"name the projection to edit with {{}} for the layer (--module); {linear_maps(model)}"
    if not isinstance(depth, int) or not isinstance(width, int):
        raise UnknownArchitecture(
            f"The config of {type(model).__name__} has no num_hidden_layers or no hidden_size; {advice}."
        )
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and any((linear_shape(part) or (0, 0))[1] == width for part in module.modules())
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
            f"(lists of that length: {found}); {advice}."
        )
    return names[0]


def find_projection(block: nn.Module, width: int, inner: set[int], path: str) -> str:
    """The one projection to `width` that writes a block's MLP, of these `inner` widths; else an UnknownArchitecture."""
    shapes = {name: shape for name, module in block.named_modules() if (shape := linear_shape(module)) is not None}
    # A map inside another one is a part of it: the weights of an adapter, what it was put around.
    shapes = {n: s for n, s in shapes.items() if not any(n.startswith(f"{o}.") for o in shapes)}
    outside = [n for n in shapes if shapes[n][1] == width and not _mixes_tokens(block, n)]
    experts = [
        name
        for name, parameter in block.named_parameters()
        if parameter.ndim == 3 and min(parameter.shape) > 1 and not _mixes_tokens(block, name)
    ]
    kind = type(block).__name__
    # What is left of it without the experts that stand in a list, one module each.
    single = [name for name in outside if not _in_list(block, name)]
    listed = [name for name in outside if name not in single]
    if experts or len(listed) > 1:
        parts = experts or listed
        some = ", ".join([*parts[:4], *(["..."] if len(parts) > 4 else [])])
        what = f"{kind} has several projections side by side, as experts are ({some})"
        if single:
            raise UnknownArchitecture(f"{what}, each for a part of the tokens; {_advice(path, single[-1])}.")
        raise UnknownArchitecture(
            f"{what} and none that every token goes through, so its MLP cannot be edited; choose a "
            "model with dense layers."
        )
    fitting = [name for name in outside if shapes[name][0] in inner]
    names = fitting or outside
    if not names:
        inside = [name for name in shapes if shapes[name][1] == width]
        advice = f"; {_advice(path, inside[-1])}" if inside else ""
        raise UnknownArchitecture(
            f"{kind} has no MLP: no linear map with {width} outputs stands outside what mixes its "
            f"tokens (found {', '.join(shapes) or 'no linear map at all'}){advice}."
        )
    if len({name.rpartition(".")[0] for name in names}) > 1:
        raise UnknownArchitecture(
            f"The projection to edit in {kind} is not clear, for {len(names)} modules of it could be the one (found "
            f"{', '.join(names[:8])}); {_advice(path, max(names, key=lambda name: shapes[name][0]))}."
        )
    return names[-1]  # an MLP as wide as the model itself: the last map is the one that writes


def _mixes_tokens(block: nn.Module, name: str) -> bool:
    """Whether `name` lies inside a part of `block` that lets tokens see each other.

    Attention shows in its name; a state-space or recurrent mixer in the convolution over tokens that all of them begin
    with.
    """
    module = block
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        kind = type(module).__name__.lower()
        if "layer" in kind:  # a whole layer with attention in it, as Zamba 2 has inside a block
            kind = ""
        if any(word in f"{part} {kind}".lower() for word in ("attn", "attention")):
            return True
        convolutions = (child for child in module.children() if isinstance(child, nn.Conv1d))
        if any(convolution.kernel_size[0] > 1 for convolution in convolutions):
            return True
    return False


def _in_list(block: nn.Module, name: str) -> bool:
    """Whether `name` lies inside a list of modules of `block`, as experts or stages do."""
    parts = name.split(".")
    return any(isinstance(block.get_submodule(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _advice(path: str, projection: str) -> str:
    return f'name the one to edit, for example --module "{path}.{{}}.{projection}"'


def linear_maps(model: nn.Module) -> str:
    """The model's linear maps as a user would name them, {} for their first number, a few of them."""
    names = (name for name, part in model.named_modules() if linear_shape(part) is not None)
    forms = {re.sub(r"(^|\.)\d+(?=\.)", r"\1{}", name, count=1) for name in names}
    found = sorted(form for form in forms if "{}" in form)
    return f"this model has {', '.join(found[:12])}" if found else "this model has no linear map"
