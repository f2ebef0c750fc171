"""One pass of the real code over tensors that hold nothing: what it would compute, and what it would keep in memory.

Model and batch are fake tensors (torch.FakeTensorMode): every operation runs with its shapes and dtypes and without
its arithmetic. So whatever a part does, with its attention kernel, adapters, checkpointing and autocast, is counted as
it is done. Small known numbers (token ids, labels, masks) stay real, because the code looks at them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from eyespot.models.vlm import PARTS, VLM

aten = torch.ops.aten


def attention_formula(kernel: Any) -> Callable[..., int]:
    """torch's formula of an attention kernel for CUDA, for the one for CPUs: it has the same first arguments, and torch
    has no formula for it."""

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return int(flop_registry[kernel](*args, out_val=out_val))

    formula._get_raw = True  # type: ignore[attr-defined]  # takes tensors, as those of the registry do
    return formula


CPU_ATTENTION = {  # custom_mapping of a FlopCounterMode
    aten._scaled_dot_product_flash_attention_for_cpu: attention_formula(aten._scaled_dot_product_flash_attention),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_formula(
        aten._scaled_dot_product_flash_attention_backward
    ),
}
FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **CPU_ATTENTION}
HEAD = "head and loss"  # what happens outside of all parts
PHASES = ("forward", "backward")


@dataclass(frozen=True)
class Spec:
    """Shape, stride and dtype of a tensor that an operation reads."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Call:
    """An operation on arguments of certain shapes: how often it happens, and what it does each time.

    args, kwargs: with a Spec in place of every tensor. flops: multiplications and additions of matrix products,
    convolutions and attention. num_bytes: that it reads and writes.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    flops: float
    num_bytes: float
    dtype: torch.dtype | None
    count: int = 0

    @property
    def name(self) -> str:
        return str(self.func)


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most are needed: weights and buffers, gradients, the two means of AdamW, and all else
    (activations kept for the backward pass, temporary results, the batch)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass
class Trace:
    """What a pass does. flops: by (part, "forward" or "backward"). calls: without views, which cost nothing but the
    time to say so; num_ops counts them too."""

    memory: Memory
    flops: dict[tuple[str, str], float] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    num_ops: int = 0

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())


class Ledger:
    """Bytes of all storages that are alive, and the most there ever were."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.gradients = self.gradients_at_peak = 0
        self._sizes: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (key := storage._cdata) in self._sizes:
            return
        self._sizes[key] = size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._free, key)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self.gradients

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def hold_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()


class Recorder(TorchDispatchMode):
    """Runs every operation, on fake tensors or on known numbers, and writes down what it was."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = ledger
        self.flops: dict[tuple[str, str], float] = {}
        self.calls: dict[Any, Call] = {}
        self.num_ops = 0
        self.phase = PHASES[0]
        self.stack: list[str] = []  # parts whose modules are running
        self.behind = HEAD  # the part whose backward pass is running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_known(func, args, kwargs):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
        else:
            args = _without_bool_indices(func, args)
            out = func(*args, **kwargs)
        self.num_ops += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.ledger.hold(tensor)
        if not is_view(func):
            self._note(func, args, kwargs, out)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        key = (func, _key(args), _key(kwargs))
        call = self.calls.get(key)
        if call is None:
            call = self.calls[key] = _call(func, args, kwargs, out)
        call.count += 1
        if call.flops:
            place = (self.stack[-1] if self.stack else self.behind, self.phase)
            self.flops[place] = self.flops.get(place, 0.0) + call.flops

    @contextmanager
    def watching(self, model: VLM) -> Iterator[None]:
        """Inside, it is known which part an operation belongs to."""
        handles = []
        for part in PARTS:
            module = getattr(model, part)
            for inner in [] if module is None else module.modules():
                handles.append(inner.register_forward_pre_hook(self._entering(part)))
                # always: checkpointing ends a pass by an error as soon as it has what it needs
                handles.append(inner.register_forward_hook(self._leaving(part), always_call=True))
        self.stack, self.behind = [], HEAD
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, part: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self.stack or self.stack[-1] != part:
                outside = self.stack[-1] if self.stack else HEAD
                self._on_gradient(inputs, outside)
            self.stack.append(part)

        return enter

    def _leaving(self, part: str) -> Callable[..., None]:
        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self.stack.pop()
            if not self.stack or self.stack[-1] != part:
                values = list(output.values()) if isinstance(output, dict) else output
                self._on_gradient(values, part)

        return leave

    def _on_gradient(self, tensors: Any, part: str) -> None:
        """When the backward pass reaches these tensors, what follows belongs to a part."""

        def arrive(gradient: Tensor) -> None:
            self.behind = part

        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(arrive)


def is_known(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether all that an operation needs is there: real tensors, or whole numbers made from nothing."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) for tensor in tensors)
    dtype = kwargs.get("dtype")
    if dtype is None:
        return bool(func in (aten.arange.default, aten.arange.start, aten.arange.start_step))
    return not (dtype.is_floating_point or dtype.is_complex)


def _without_bool_indices(func: Any, args: Any) -> Any:
    """A known mask that picks from a fake tensor, as the places that it picks, whose number is known."""
    if func not in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return args
    with unset_fake_temporarily():
        places: list[Tensor | None] = []
        for index in args[1]:
            is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
            places += index.nonzero(as_tuple=True) if is_mask else [index]
    return (args[0], places, *args[2:])


_VIEWS: dict[Any, bool] = {}


def is_view(func: Any) -> bool:
    """Whether an operation only looks at the same numbers in another way."""
    if func not in _VIEWS:
        aliases = [returned.alias_info for returned in func._schema.returns]
        _VIEWS[func] = any(alias is not None and not alias.is_write for alias in aliases)
    return _VIEWS[func]


def _key(value: Any) -> Any:
    """Equal for arguments between which an operation makes no difference."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in value.items())
    return value if isinstance(value, (int, float, bool, str, type(None))) else str(value)


def _call(func: Any, args: Any, kwargs: Any, out: Any) -> Call:
    inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    outputs = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
    formula = FLOPS.get(func._overloadpacket)
    flops = 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
    floats = [tensor.dtype for tensor in (*outputs, *inputs) if tensor.is_floating_point()]
    specs, named = tree_map(_spec, (tuple(args), dict(kwargs)))
    num_bytes = sum(_touched(tensor) for tensor in (*inputs, *outputs))
    return Call(func, specs, named, flops, num_bytes, floats[0] if floats else None)


def _spec(value: Any) -> Any:
    return Spec(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _touched(tensor: Tensor) -> int:
    """Bytes of the different numbers in a tensor; one that is expanded has fewer than places."""
    places = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places *= size if stride else 1
    return int(places * tensor.element_size())


def as_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake tensors, which believe to be on a CPU, in the place of a model's tensors."""

    def faked(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    with_tensors(model, faked)


def with_tensors(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors in the place of a model's tensors, all but fake ones; tied ones stay tied."""
    seen: dict[Tensor, Tensor] = {}

    def made(tensor: Tensor) -> Tensor:
        if tensor not in seen:
            is_parameter = isinstance(tensor, nn.Parameter)
            seen[tensor] = nn.Parameter(make(tensor), tensor.requires_grad) if is_parameter else make(tensor)
        return seen[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    tensors[name] = made(tensor)  # type: ignore[assignment]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of different storages; a tied weight counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def trace_training(
    model: VLM, batch: dict[str, Tensor], loss: Callable[[dict[str, Tensor]], Tensor], *, bf16: bool, accumulates: bool
) -> Trace:
    """Forward and backward of one micro-batch.

    Args:
        model: of fake tensors, its parts set trainable. batch: fake and known tensors. loss: of a batch.
        bf16: matrix products in bfloat16 over float32 weights (autocast). accumulates: gradients of micro-batches
            before this one are there already.
    """
    learning = [p for p in model.parameters() if p.requires_grad]
    ledger, recorder = _opened(model, batch)
    for parameter in learning if accumulates else []:
        parameter.grad = torch.empty_like(parameter)
        ledger.hold_gradient(parameter)
        ledger.hold(parameter.grad)
    hooks = [p.register_post_accumulate_grad_hook(ledger.hold_gradient) for p in learning if not accumulates]
    with recorder.watching(model), recorder, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        value = loss(batch)
        recorder.phase = PHASES[1]
        value.backward()
    for hook in hooks:
        hook.remove()
    for parameter in learning:
        parameter.grad = None
    states = 2.0 * sum(p.numel() * p.element_size() for p in learning)
    return _finished(model, recorder, ledger.gradients_at_peak, states)


def trace_inference(model: VLM, batch: dict[str, Tensor], new_tokens: int, *, bf16: bool) -> Trace:
    """A prompt and the last of the new tokens, when the cache is longest; memory is the larger of the two peaks.

    Args:
        batch: input_ids int64 [B, T] without padding, and the pictures.
    """
    ids = batch["input_ids"]
    ledger, recorder = _opened(model, batch)
    with torch.no_grad(), recorder.watching(model), recorder, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = model.encode_images(batch["pixel_values"])
        cache = model(input_ids=ids, image_features=features, use_cache=True, logits_to_keep=1).past_key_values
        del features
        if new_tokens > 1:
            peak = ledger.peak
            words = ids.new_ones(len(ids), new_tokens - 1)
            if words.shape[1] > 1:  # the tokens between, at once: only their cache is wanted
                cache = model(input_ids=words[:, 1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = cache.past_key_values
            ledger.peak = ledger.now
            model(input_ids=words[:, :1], past_key_values=cache, use_cache=True)
            ledger.peak = max(peak, ledger.peak)
    return _finished(model, recorder, 0.0, 0.0)


def trace_encoding(model: VLM, pixels: Tensor, *, bf16: bool) -> Trace:
    """The encoder alone, as it fills the feature cache: pixels float [N, 3, H, W]."""
    _, recorder = _opened(model, {"pixel_values": pixels})
    with torch.no_grad(), recorder.watching(model), recorder, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.encode_images(pixels)
    return _finished(model, recorder, 0.0, 0.0)


def _opened(model: VLM, batch: dict[str, Tensor]) -> tuple[Ledger, Recorder]:
    """A ledger in which model and batch stand."""
    ledger = Ledger()
    for tensor in (*model.parameters(), *model.buffers(), *batch.values()):
        ledger.hold(tensor)
    return ledger, Recorder(ledger)


def _finished(model: VLM, recorder: Recorder, gradients: float, states: float) -> Trace:
    weights = float(bytes_of((*model.parameters(), *model.buffers())))
    memory = Memory(weights, gradients, states, recorder.ledger.peak - weights - gradients)
    return Trace(memory, recorder.flops, list(recorder.calls.values()), recorder.num_ops)
