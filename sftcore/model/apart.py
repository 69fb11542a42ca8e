"""Products that a model's own code asks for in float32, kept so under autocast: routers, above all.

In: a float32 model that will compute under autocast, standing for one that is held in bfloat16. Out: the same
model, whose modules with such products compute outside of autocast.
Invariant: what is multiplied in float32 in a bfloat16 model is so here: `F.linear(x.float(), w.float())`
would else be one in bfloat16, and tokens go to other experts.
Trade-off: a bfloat16 miniature of the same code tells which classes of modules do so (0.1 s at a start); a
class that multiplies in both dtypes itself is left to autocast.
"""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftcore.model.kept import kept_parameters
from sftcore.model.miniature import BREAKS, build, shrink

log = logging.getLogger(__name__)
PRODUCTS = (F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)
NUM_PROBED = 64  # tokens, so that every expert is met
DTYPE = torch.bfloat16


def compute_apart(model: PreTrainedModel) -> None:
    """Let modules compute outside of autocast that do so in float32 in a bfloat16 model, in place.

    Their own code then decides, as it does there; what they call in turn is under autocast again.
    """
    kept = {id(parameter) for parameter in kept_parameters(model).values()}
    in_float32 = classes_in_float32(model.config)
    whole, partly = [], []
    for module in model.modules():
        held = list(module.parameters())
        if held and all(id(parameter) in kept for parameter in held):
            whole.append(module)
        elif held and type(module).__qualname__ in in_float32:
            partly.append(module)
    apart = {id(module) for module in (*whole, *partly)}
    for module in whole:
        _take_apart(module)
    for module in partly:
        was_on = _take_apart(module)
        for child in module.children():
            if id(child) not in apart:
                _put_back(child, was_on)


def _take_apart(module: nn.Module) -> list[bool]:
    """Run a module without autocast; the list says whether it was on at the last call."""
    forward: Callable[..., Any] = module.forward
    was_on = [False]

    @functools.wraps(forward)
    def apart(*args: Any, **options: Any) -> Any:
        device = next(a.device.type for a in (*args, *options.values()) if torch.is_tensor(a))
        was_on[0] = torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False):
            return forward(*args, **options)

    module.forward = apart
    return was_on


def _put_back(module: nn.Module, was_on: list[bool]) -> None:
    """Run a module under autocast, if the one around it was called so."""
    forward: Callable[..., Any] = module.forward

    @functools.wraps(forward)
    def within(*args: Any, **options: Any) -> Any:
        device = next(a.device.type for a in (*args, *options.values()) if torch.is_tensor(a))
        with torch.autocast(device, dtype=DTYPE, enabled=was_on[0]):
            return forward(*args, **options)

    module.forward = within


def classes_in_float32(config: Any) -> set[str]:
    """Names of the classes of modules whose own products are all of float32 in a bfloat16 model."""
    try:
        model = build(shrink(config, longest=NUM_PROBED), AutoModelForCausalLM, attn_implementation="eager")
        watch = Products.of(hold_in_bfloat16(model))
        with torch.no_grad(), watch:
            model(input_ids=torch.arange(3, 3 + NUM_PROBED)[None], use_cache=False)
    except BREAKS as error:
        log.info("no miniature of %s tells what it computes in float32: %s", config.model_type, error)
        return set()
    return {name for name, dtypes in watch.of_classes().items() if dtypes == {torch.float32}}


def hold_in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    """As transformers loads it: parameters on the model's lists stay float32."""
    kept = kept_parameters(model)
    held = {name: parameter.data for name, parameter in kept.items()}
    nn.Module.to(model, DTYPE)
    for name, parameter in kept.items():
        parameter.data = held[name]
    return model


class Products(TorchFunctionMode):
    """Notes of each product within which module it is made, and of which dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.within: list[nn.Module] = []
        self.made: list[
            tuple[nn.Module, torch.dtype, torch.dtype]
        ] = []  # module, of the inputs, of the result

    @classmethod
    def of(cls, model: nn.Module) -> Products:
        """Of a model's forwards."""
        watch = cls()

        def leave(*_: Any) -> None:
            watch.within.pop()

        for module in model.modules():
            module.register_forward_pre_hook(lambda module, _: watch.within.append(module))
            module.register_forward_hook(leave)
        return watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and note a product."""
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and self.within and len(args) > 1:
            both = torch.promote_types(args[0].dtype, args[1].dtype)
            self.made.append((self.within[-1], both, result.dtype))
        return result

    def of_classes(self) -> dict[str, set[torch.dtype]]:
        """Dtypes of the inputs of products, by the class of the module that makes them."""
        found: dict[str, set[torch.dtype]] = defaultdict(set)
        for module, dtype, _ in self.made:
            found[type(module).__qualname__].add(dtype)
        return found
