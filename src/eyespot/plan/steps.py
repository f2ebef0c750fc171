"""What a step of a run costs, traced: parameters, FLOPs, memory, operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from eyespot.config import (
    ModelSettings,
    TrainerSettings,
    TrainSettings,
    stage_losses,
    stage_settings,
    stages_model,
    to_dict,
)
from eyespot.models.parameters import ParameterRow, count_parameters
from eyespot.models.vlm import PARTS, VLM
from eyespot.plan.batches import Assumed, Batch, MicroBatch, Reader, Workload, workload
from eyespot.plan.skeleton import Skeleton, skeleton
from eyespot.plan.trace import Call, Memory, Trace, as_fake, trace_encoding, trace_inference, trace_training
from eyespot.training.run import with_tokenizer
from eyespot.training.stages import training_texts

NF4_BYTES = 0.52  # of a weight: four bits, a scale for each 64 weights, the scales in eight bits (arXiv 2305.14314)
ENCODED_AT_ONCE = 16  # pictures in a batch that fills the feature cache
PROMPT = 32  # tokens of a question beside its picture, assumed for inference


@dataclass(frozen=True)
class Stage:
    """A training of its own: the whole run, or one of its stages.

    settings: as of a run. kind: "instruct" unless a stage says otherwise. train: part to mode. losses: by name; none
    means the language model's own.
    """

    name: str
    kind: str
    settings: TrainSettings
    train: Mapping[str, Any]
    losses: Mapping[str, float]


def stages_of(settings: TrainSettings) -> list[Stage]:
    """The trainings of a run, one after the other; tokenizers that it learns are learned."""
    if settings.stages is None:
        model = settings.model
        train = {"vision": model.vision.train, "connector": model.connector.train, "language": model.language.train}
        return [Stage(settings.name, "instruct", settings, train, {})]
    model = with_tokenizer(stages_model(settings), training_texts(settings))
    found = []
    for number, stage in enumerate(settings.stages):
        if stage.kind == "preference":
            continue
        own = replace(stage_settings(settings, number), model=model)
        found.append(Stage(stage.name, stage.kind, own, to_dict(stage.train), stage_losses(stage)))
    return found


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    parameters: by part. work: what the run reads. flops: by (part, phase), of one sample. memory: at the peak. calls,
    num_ops: of the whole step, optimizer excluded. encoding: of one picture, if features are kept. feature_bytes: of
    one picture.
    """

    parameters: list[ParameterRow]
    work: Workload
    flops: dict[tuple[str, str], float]
    memory: Memory
    calls: list[Call]
    num_ops: float
    encoding: Trace | None
    feature_bytes: float
    settings: TrainSettings

    @property
    def samples(self) -> float:
        """That one step reads on one device."""
        return self.work.samples * self.settings.trainer.accumulate

    @property
    def flops_per_sample(self) -> float:
        """With the share of a picture's one encoding that falls on each sample."""
        return sum(self.flops.values()) + self.encoding_flops_per_sample

    @property
    def encoding_flops_per_sample(self) -> float:
        if self.encoding is None:
            return 0.0
        return self.encoding.total_flops * self.work.num_pictures / max(1.0, self.work.num_samples)

    @property
    def trainable(self) -> int:
        return self.parameters[-1].trainable


class Tracer:
    """Traces of stages, for devices with and without quick bfloat16; data and models are made once.

    Args:
        assumed: about data, in place of reading it.
    """

    def __init__(self, assumed: Assumed | None = None) -> None:
        self.reader, self.assumed = Reader(), assumed
        self._parts: dict[str, tuple[Skeleton, FakeTensorMode]] = {}

    def step(self, stage: Stage, fast_bfloat16: bool) -> Step:
        """What a step costs where bfloat16 is quick, or where it is not."""
        parts, mode = self.parts(stage, fast_bfloat16)
        settings = stage.settings
        work = workload(settings, stage.kind, parts, self.reader, self.assumed)
        caches, bf16 = keeps_features(settings, parts.model, work), runs_bf16(settings.trainer, fast_bfloat16)
        typical = widest = self._trace(stage, work.typical, fast_bfloat16, caches)
        if work.widest is not work.typical:
            widest = self._trace(stage, work.widest, fast_bfloat16, caches)
        accumulate = settings.trainer.accumulate
        return Step(
            parameters=count_parameters(parts.model),
            work=work,
            flops={place: flops / work.typical.samples for place, flops in typical.flops.items()},
            memory=placed_memory(widest.memory, parts.model, settings),
            calls=[replace(call, count=call.count * accumulate) for call in typical.calls],
            num_ops=typical.num_ops * accumulate,
            encoding=_encoding(parts, mode, bf16) if caches else None,
            feature_bytes=feature_bytes(parts.model, bf16),
            settings=settings,
        )

    def memory_at(self, stage: Stage, fast_bfloat16: bool, batch_size: int) -> Memory:
        """Of a step of so many samples."""
        settings = replace(stage.settings, trainer=replace(stage.settings.trainer, batch_size=batch_size))
        sized = replace(stage, settings=settings)
        parts, _ = self.parts(sized, fast_bfloat16)
        work = workload(settings, stage.kind, parts, self.reader, self.assumed)
        found = self._trace(sized, work.widest, fast_bfloat16, keeps_features(settings, parts.model, work))
        return placed_memory(found.memory, parts.model, settings)

    def inference(self, stage: Stage, fast_bfloat16: bool, batch_size: int, new_tokens: int) -> Memory:
        """Of answering so many questions at once, each about one picture."""
        parts, mode = self.parts(stage, fast_bfloat16)
        config = parts.model.config
        picture = torch.full((batch_size, config.num_image_tokens), config.image_token_id)
        places = getattr(config.text_config.get_text_config(), "max_position_embeddings", None) or 10**9
        words = max(1, min(PROMPT, places - config.num_image_tokens - new_tokens))
        ids = torch.cat([picture, torch.ones(batch_size, words, dtype=torch.long)], dim=1)
        with mode:
            pixels = torch.empty(batch_size, 3, parts.image_size, parts.image_size)
            parts.model.eval()  # type: ignore[no-untyped-call]
            found = trace_inference(parts.model, {"input_ids": ids, "pixel_values": pixels}, new_tokens, bf16=False)
        return packed_memory(found.memory, parts.model, stage.settings.model)

    def parts(self, stage: Stage, fast_bfloat16: bool) -> tuple[Skeleton, FakeTensorMode]:
        """The model of a stage as fake tensors, what learns set trainable and in training mode."""
        model, trainer = stage.settings.model, stage.settings.trainer
        key = f"{model} {fast_bfloat16} {trainer.gradient_checkpointing}"
        if key not in self._parts:
            parts, mode = self._skeleton(stage, fast_bfloat16), FakeTensorMode(allow_non_fake_inputs=True)
            as_fake(parts.model, mode)
            self._parts[key] = parts, mode
        parts, mode = self._parts[key]
        _set_up(parts.model, stage)
        return parts, mode

    def empty_parts(self, stage: Stage, fast_bfloat16: bool) -> Skeleton:
        """The same on the meta device, of its own."""
        parts = self._skeleton(stage, fast_bfloat16)
        _set_up(parts.model, stage)
        return parts

    def _skeleton(self, stage: Stage, fast_bfloat16: bool) -> Skeleton:
        model, trainer = stage.settings.model, stage.settings.trainer
        own = self.reader.samples(stage.settings.data, trainer.seed) if learns_words(stage) else None
        parts = skeleton(with_tokenizer(model, own[0]) if own is not None else model, fast_bfloat16)
        if trainer.gradient_checkpointing:
            # transformers 5.23 renamed it
            getattr(parts.model, "activation_checkpointing_enable", parts.model.gradient_checkpointing_enable)()
        return parts

    def _trace(self, stage: Stage, batch: MicroBatch, fast_bfloat16: bool, caches: bool) -> Trace:
        parts, mode = self.parts(stage, fast_bfloat16)
        trainer = stage.settings.trainer
        bf16 = runs_bf16(trainer, fast_bfloat16)
        with mode:
            whole = with_pictures(batch.tensors, parts, caches, bf16)
            loss = loss_of(stage, parts.model)
            return trace_training(parts.model, whole, loss, bf16=bf16, accumulates=trainer.accumulate > 1)


def learns_words(stage: Stage) -> bool:
    """Whether a tokenizer is learned from the training texts."""
    return (stage.settings.model.language.tokenizer or "").startswith("bpe:")


def runs_bf16(trainer: TrainerSettings, fast_bfloat16: bool) -> bool:
    """Whether matrix products are in bfloat16 over float32 weights; see ``eyespot.training.run.precision_of``."""
    return fast_bfloat16 if trainer.precision == "auto" else trainer.precision == "bf16"


def _set_up(model: VLM, stage: Stage) -> None:
    """What learns set trainable, in training mode."""
    frozen = dict.fromkeys(PARTS, "frozen")
    model.set_trainable(**{**frozen, **stage.train})
    model.train()


def keeps_features(settings: TrainSettings, model: VLM, work: Workload) -> bool:
    """Whether the encoder sees each picture once; see ``eyespot.training.run.cached_features``."""
    frozen = not any(p.requires_grad for p in model.vision.parameters())
    size = work.num_pictures * feature_bytes(model, bf16=False)
    return (
        frozen and settings.data.cache_features and not settings.data.augment and size <= settings.data.cache_gb * 1e9
    )


def feature_bytes(model: VLM, bf16: bool) -> float:
    """Of one picture."""
    half = bf16 or model.vision.dtype == torch.bfloat16
    return float(num_features(model) * model.config.vision_config.hidden_size * (2 if half else 4))


def num_features(model: VLM) -> int:
    """Features of one picture that the connector reads, P."""
    from eyespot.models.vision.pretrained import token_counts

    prefix, patches = token_counts(model.config.vision_config)
    return patches + prefix * model.config.keep_cls


def with_pictures(batch: Batch, parts: Skeleton, caches: bool, bf16: bool) -> Batch:
    """A batch with fake pictures, or features, in place of the empty ones."""
    if "image_features" not in batch:
        return batch
    number = len(batch["image_features"])
    rest = {name: tensor for name, tensor in batch.items() if name != "image_features"}
    if not caches:
        return rest | {"pixel_values": torch.empty(number, 3, parts.image_size, parts.image_size)}
    model = parts.model
    half = bf16 or model.vision.dtype == torch.bfloat16
    width = model.config.vision_config.hidden_size
    dtype = torch.bfloat16 if half else torch.float32
    return rest | {"image_features": torch.empty(number, num_features(model), width, dtype=dtype)}


def loss_of(stage: Stage, model: VLM) -> Callable[[Batch], Tensor]:
    """The loss of a micro-batch, as the stage's module computes it."""
    if not stage.losses:
        return lambda batch: model(**batch, num_items_in_batch=1).loss
    from eyespot.training.align_module import AlignModule
    from eyespot.training.detect_module import DetectModule

    make = DetectModule if stage.kind == "detect" else AlignModule
    module = make(model, stage.settings.trainer, 1, stage.losses)

    def loss(batch: Batch) -> Tensor:
        number = len(batch.get("image_features", batch.get("pixel_values", ())))
        return module._weighted(module.shares_of(batch, [number], 0, 0))

    return loss


def _encoding(parts: Skeleton, mode: FakeTensorMode, bf16: bool) -> Trace:
    """The encoder's pass over a batch of pictures, its FLOPs for one of them."""
    with mode:
        pixels = torch.empty(ENCODED_AT_ONCE, 3, parts.image_size, parts.image_size)
        found = trace_encoding(parts.model, pixels, bf16=bf16)
    found.flops = {place: flops / ENCODED_AT_ONCE for place, flops in found.flops.items()}
    return found


def placed_memory(memory: Memory, model: VLM, settings: TrainSettings) -> Memory:
    """On one of the devices of a run, weights packed as the settings say.

    With several devices there are copies of the gradients on their way (DDP), or a share of what is spread (FSDP; the
    layers that are gathered for a moment are not counted).
    """
    memory, trainer = packed_memory(memory, model, settings.model), settings.trainer
    world = trainer.devices * trainer.num_nodes
    if trainer.strategy == "fsdp":
        weights, gradients, optimizer = (part / world for part in (memory.weights, memory.gradients, memory.optimizer))
        return Memory(weights, gradients, optimizer, memory.activations)
    return replace(memory, activations=memory.activations + (memory.optimizer / 2 if world > 1 else 0.0))


def packed_memory(memory: Memory, model: VLM, settings: ModelSettings) -> Memory:
    """With the language model's linear layers in four bits, if the settings say so."""
    if settings.language.quantize is None:
        return memory
    head = model.language.get_output_embeddings()
    layers = [
        module.weight
        for name, module in model.language.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and "lora_" not in name
    ]
    saved = sum(weight.numel() * (weight.element_size() - NF4_BYTES) for weight in layers)
    return replace(memory, weights=memory.weights - saved)
