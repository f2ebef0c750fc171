"""Expected time and memory of the large recipes: the formula of docs/recipes.md, against which its table is tested.

Shape letters are those of eyespot.models.vlm.
"""

from __future__ import annotations

from pathlib import Path

from eyespot.config import TrainSettings, stage_settings
from eyespot.models.lora import is_adapter
from eyespot.models.vision.pretrained import token_counts
from eyespot.models.vlm import VLM

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
SAMPLES = {
    "gemma270m_llava": 157_712, "smollm360m_flickr8k": 6_000, "scratch_222m": 558_128, "qformer_two_stage": 558_128,
    "nanovlm_222m": 665_298,
}  # fmt: skip
INSTRUCTIONS = 157_712  # of the second stage of qformer_two_stage
TEXT = {  # tokens of a sample beside its picture, and those of them that are learned; assumed
    "gemma270m_llava": (200, 150), "smollm360m_flickr8k": (15, 12), "scratch_222m": (30, 15),
    "qformer_two_stage": (200, 150), "nanovlm_222m": (220, 120),
}  # fmt: skip
SHARE = 0.4
A100, H100 = 312e12, 989e12  # bfloat16, dense: NVIDIA's data sheets (A100, H100 SXM)


def rows_of_page() -> dict[str, list[str]]:
    """Recipe to the cells of its row in the table of the page."""
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in lines if len(cells) == 7}


def estimate(recipe: str, settings: TrainSettings, model: VLM) -> list[str]:
    """Parameters, those that learn, GFLOP for a sample, minutes on an A100 and an H100, and GB, as on the page."""
    run = settings if settings.stages is None else stage_settings(settings, 1)
    text, learned = TEXT[recipe]
    flop = language_flop(model, text, learned) + vision_flop(model, run)
    samples = INSTRUCTIONS if settings.stages else SAMPLES[recipe]
    total = flop * samples * (1 - share_held_out(run)) * run.trainer.epochs
    if settings.stages is not None:
        first = stage_settings(settings, 0)
        visits = SAMPLES[recipe] * (1 - share_held_out(first)) * first.trainer.epochs
        total += visits * (joint_flop(model) + vision_flop(model, first))
    minutes = [total / SHARE / peak / 60 for peak in (A100, H100)]
    memory = weight_bytes(model) + activation_bytes(model, run, text)
    parameters = list(model.parameters())
    return [
        f"{sum(p.numel() for p in parameters):,}",
        f"{sum(p.numel() for p in parameters if p.requires_grad):,}",
        f"{flop / 1e9:,.0f}",
        *(f"{minute:,.0f}" for minute in minutes),
        f"{memory / 1e9:.0f}",
    ]


def share_held_out(settings: TrainSettings) -> float:
    return 0.0 if settings.data.validation is not None else settings.data.validation_share


def image_tokens(model: VLM) -> tuple[int, int]:
    """Tokens of the encoder, and K."""
    prefix, patches = token_counts(model.config.vision_config)
    kept = patches + prefix * model.config.keep_cls
    return prefix + patches, model.connector.num_tokens(kept)  # type: ignore[operator]


def products(weights: int, tokens: int, layers: int, width: int) -> float:
    """Forward: 2 for each weight and token, and 4 L T^2 D for queries with keys and weights with values."""
    return 2.0 * weights * tokens + 4.0 * layers * tokens**2 * width


def vision_flop(model: VLM, settings: TrainSettings) -> float:
    """Forward and backward if it learns; once for each picture if it is frozen and its features are kept."""
    config, tokens = model.config.vision_config, image_tokens(model)[0]
    forward = products(size(model.vision), tokens, config.num_hidden_layers, config.hidden_size)
    learns = any(p.requires_grad for p in model.vision.parameters())
    return 3 * forward if learns else forward / max(1.0, settings.trainer.epochs)


def language_flop(model: VLM, text: int, learned: int) -> float:
    """Connector, language model and head: 3 forwards for what learns, 2 for what the gradient only passes through."""
    config = model.config.text_config
    _, k = image_tokens(model)
    tokens = k + text
    adapters = sum(p.numel() for name, p in model.language.named_parameters() if is_adapter(name, "none"))
    times = 2 if adapters else 3
    table = config.vocab_size * config.hidden_size
    blocks = size(model.language) - adapters - table * (1 if config.tie_word_embeddings else 2)
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    connector = sum(p.numel() for p in model.connector.parameters() if p.requires_grad)
    return (
        times * products(blocks, tokens, config.num_hidden_layers, 0)
        + 3 * products(adapters, tokens, config.num_hidden_layers, width)
        + times * products(table, learned, 0, 0)
        + 3 * products(connector, k, 0, 0)
    )


def joint_flop(model: VLM) -> float:
    """The Q-Former's passes for a pair: queries, text, three pairs to match (one true, two not), and captioning."""
    queries, text, passes_with_picture = 32, 32, 5
    tokens = queries + text + 3 * (queries + text) + (queries + text)
    sizes = {name: p.numel() for name, p in model.connector.named_parameters() if "layers." in name}
    cross = sum(n for name, n in sizes.items() if "cross_attention.k" in name or "cross_attention.v" in name)
    one_path = sum(n for name, n in sizes.items() if "text_mlp" not in name) - cross
    return 3 * (products(one_path, tokens, 0, 0) + products(cross, 257 * passes_with_picture, 0, 0))


def size(module: object) -> int:
    return sum(p.numel() for p in module.parameters())  # type: ignore[attr-defined]


def weight_bytes(model: VLM) -> float:
    """Frozen weights in bfloat16; what learns: float32 weight, gradient and AdamW's two means, and a bfloat16 copy."""
    return float(sum(p.numel() * (18 if p.requires_grad else 2) for p in model.parameters()))


def activation_bytes(model: VLM, settings: TrainSettings, text: int) -> float:
    """34 bytes for each token, layer and unit of width (arXiv 2205.05198, without the attention's matrices), or 2 where
    activations are computed again; and the scores of 256 words at a time in float32, twice."""
    config, vision = model.config.text_config, model.config.vision_config
    encoder_tokens, k = image_tokens(model)
    batch = settings.trainer.batch_size
    each = 2 if settings.trainer.gradient_checkpointing else 34
    total = batch * (k + text) * config.hidden_size * (each * config.num_hidden_layers + 34 * (each == 2))
    if any(p.requires_grad for p in model.vision.parameters()):
        total += batch * encoder_tokens * vision.hidden_size * each * vision.num_hidden_layers
    return total + 2 * 4 * 256 * config.vocab_size
