"""The Querying Transformer of BLIP-2: learned queries read a picture, alone or together with a text.

A BERT whose self-attention serves queries and text alike, whose feed-forwards are separate, and where every so many
layers the queries, and only they, look at the picture.

Shape letters: N pictures, P patches, K queries, T text tokens, E vision width, H Q-Former width, D language width,
V text vocabulary.

Source: Li et al., arXiv 2301.12597, section 3.1; Devlin et al., arXiv 1810.04805 (BERT: normalisation after each
branch, initial weights, head).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, BertForMaskedLM, BertModel

from eyespot.models.loading import check_complete
from eyespot.models.merge import positions_from_mask

INITIAL_STD = 0.02  # google-research/bert, initializer_range
NORM_EPS = 1e-12  # google-research/bert, layer_norm
WITH_HEAD = {"BertForMaskedLM", "BertForPreTraining"}  # what a saved BERT calls itself when its head is with it


class Attention(nn.Module):
    """Attention from one sequence to another or to itself, added and normalised. Source: arXiv 1706.03762, 3.2."""

    def __init__(self, width: int, source_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(source_width, width)
        self.v_proj = nn.Linear(source_width, width)
        self.o_proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1))
        return split.transpose(1, 2)  # [N, L, H] -> [N, heads, L, H / heads]

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
        """x float [N, L, H], source float [N, S, source width], mask bool [N, 1, L, S] (may see) -> float [N, L, H]."""
        q, k, v = self._heads(self.q_proj(x)), self._heads(self.k_proj(source)), self._heads(self.v_proj(source))
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.norm(x + self.dropout(self.o_proj(mixed.transpose(1, 2).flatten(2))))
        return out


class FeedForward(nn.Module):
    """Two linear layers with the exact GELU between them, added and normalised."""

    def __init__(self, width: int, inner_width: int, dropout: float) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, inner_width)
        self.down_proj = nn.Linear(inner_width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """float [N, L, H] -> float [N, L, H]."""
        out: Tensor = self.norm(x + self.dropout(self.down_proj(F.gelu(self.up_proj(x)))))
        return out


class QFormerLayer(nn.Module):
    """Shared self-attention, cross-attention of the queries where this layer has one, separate feed-forwards."""

    def __init__(
        self, width: int, vision_dim: int | None, heads: int, mlp_dim: int, dropout: float, has_text: bool
    ) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        self.cross_attention = None if vision_dim is None else Attention(width, vision_dim, heads, dropout)
        self.query_mlp = FeedForward(width, mlp_dim, dropout)
        self.text_mlp = FeedForward(width, mlp_dim, dropout) if has_text else None

    def forward(self, x: Tensor, num_queries: int, features: Tensor | None, mask: Tensor | None) -> Tensor:
        """x float [N, K + T, H], queries first; features float [N, P, E], None without queries;
        mask bool [N, 1, K + T, K + T] (may see) -> float [N, K + T, H]."""
        x = self.attention(x, x, mask)
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries:
            if self.cross_attention is not None:
                queries = self.cross_attention(queries, features)
            queries = self.query_mlp(queries)
        if self.text_mlp is not None and text.shape[1]:  # a feed-forward without tokens would get gradients of zero
            text = self.text_mlp(text)
        return torch.cat([queries, text], dim=1)


class TextSide(nn.Module):
    """What only a text needs beside its feed-forwards: BERT's embeddings and its head, which share one matrix."""

    def __init__(self, vocab_size: int, max_text: int, width: int) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(max_text, width)
        self.head_proj = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head_bias = nn.Parameter(torch.zeros(vocab_size))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [N, T], int64 [N, T] -> float [N, T, H].

        Raises:
            ValueError: more tokens than there are positions.
        """
        length, limit = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(f"the text has {length} tokens but max_text is {limit}; cut it or raise max_text")
        out: Tensor = self.word_embedding(input_ids) + self.position_embedding(positions_from_mask(attention_mask))
        return out

    def logits(self, states: Tensor) -> Tensor:
        """float [..., H] -> float [..., V]."""
        transformed = self.head_norm(F.gelu(self.head_proj(states)))
        return F.linear(transformed, self.word_embedding.weight, self.head_bias)


class QFormerConnector(nn.Module):
    """[N, P, E] -> [N, K, D]: K learned queries read the patches, then one linear layer to width D.

    With ``text_vocab_size`` it also has BLIP-2's text side, which joint image-text training needs and answering does
    not: ``text_states``, ``joint_states`` and ``text_logits``. Pictures and texts stand in equal numbers; who wants a
    picture with several texts repeats its features.

    ``source`` only decides how the weights start, so it is read when they are first made. On the meta device, where
    transformers builds a model before it fills it from a saved folder, weights hold nothing and no source is read:
    the folder of a trained model is complete without it.

    Args:
        vision_dim: E. language_dim: D.
        num_queries: K, tokens for each picture, however many patches it has.
        hidden_dim: H. depth: number of layers. heads: of every attention. mlp_dim: by default 4 x H.
        cross_every: the first layer and then every so many have cross-attention.
        dropout: of attention weights, branches and embeddings.
        text_vocab_size: V; None leaves the text side out.
        max_text: longest text, in tokens.
        source: folder or Hub name of a BERT, to start from its self-attention, feed-forwards (for queries and text),
            embeddings and, if it has one, head; cross-attention and queries start fresh. The embedding of BERT's first
            segment is added to the positions. All sizes must be those of the source, ``max_text`` at most its own.

    Raises:
        ValueError: sizes that do not fit each other or the source.
    """

    def __init__(
        self,
        vision_dim: int,
        language_dim: int,
        *,
        num_queries: int = 32,
        hidden_dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        cross_every: int = 2,
        mlp_dim: int | None = None,
        dropout: float = 0.1,
        text_vocab_size: int | None = None,
        max_text: int = 64,
        source: str | None = None,
    ) -> None:
        super().__init__()
        mlp_dim = 4 * hidden_dim if mlp_dim is None else mlp_dim
        has_text = text_vocab_size is not None
        sizes = {"num_queries": num_queries, "hidden_dim": hidden_dim, "depth": depth, "heads": heads,
                 "cross_every": cross_every, "mlp_dim": mlp_dim}  # fmt: skip
        if text_vocab_size is not None:
            sizes |= {"text_vocab_size": text_vocab_size, "max_text": max_text}
        _check_sizes(sizes)
        self.hidden_dim = hidden_dim
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_dim))
        self.norm = nn.LayerNorm(hidden_dim, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_dim, None if i % cross_every else vision_dim, heads, mlp_dim, dropout, has_text)
            for i in range(depth)
        )
        self.text = None if text_vocab_size is None else TextSide(text_vocab_size, max_text, hidden_dim)
        self.proj = nn.Linear(hidden_dim, language_dim)
        nn.init.normal_(self.queries, std=INITIAL_STD)
        self.apply(_initialise)
        if source is not None and not self.queries.is_meta:
            self._start_from(source, sizes)

    def forward(self, features: Tensor) -> Tensor:
        """float [N, P, E] -> float [N, K, D]."""
        out: Tensor = self.proj(self.query_states(features))
        return out

    def num_tokens(self, num_patches: int) -> int:
        """K, for any number of patches."""
        return self.queries.shape[0]

    def query_states(self, features: Tensor) -> Tensor:
        """What the queries read in the pictures: float [N, P, E] -> float [N, K, H]."""
        queries = self.queries.expand(features.shape[0], -1, -1)
        return self._layers(queries, queries.shape[1], features, None)

    def text_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Texts alone, as BERT reads them, every token seeing every token.

        Args:
            input_ids: int64 [N, T]. attention_mask: int64 [N, T], 0 at padding, on either side.

        Returns:
            float [N, T, H]; what stands at padding has no meaning.

        Raises:
            ValueError: there is no text side, or the text is too long.
        """
        text = self._text_side().embed(input_ids, attention_mask)
        return self._layers(text, 0, None, visibility(attention_mask, 0, causal=False))

    def joint_states(
        self, features: Tensor, input_ids: Tensor, attention_mask: Tensor, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Pictures and texts together.

        Args:
            features: float [N, P, E].
            input_ids: int64 [N, T]. attention_mask: int64 [N, T], 0 at padding, on either side.
            causal: False lets queries and text see each other (matching); True lets queries see queries, and text see
                the queries and the text up to itself (captioning).

        Returns:
            Query states float [N, K, H] and text states float [N, T, H].

        Raises:
            ValueError: there is no text side, the text is too long, or there are not as many texts as pictures.
        """
        if len(features) != len(input_ids):
            raise ValueError(
                f"{len(features)} pictures meet {len(input_ids)} texts; repeat the features, so that each text has one"
            )
        text = self._text_side().embed(input_ids, attention_mask)
        queries = self.queries.expand(len(features), -1, -1)
        num_queries = queries.shape[1]
        mask = visibility(attention_mask, num_queries, causal)
        states = self._layers(torch.cat([queries, text], dim=1), num_queries, features, mask)
        return states[:, :num_queries], states[:, num_queries:]

    def text_logits(self, states: Tensor) -> Tensor:
        """Text states float [..., H] -> scores of every word float [..., V]. ValueError without a text side."""
        return self._text_side().logits(states)

    def text_side(self) -> list[nn.Parameter]:
        """The parameters that only texts use, none without a text side: language-only stages can freeze them."""
        parts = [self.text, *(layer.text_mlp for layer in self.layers)]
        return [parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters()]

    def _layers(self, x: Tensor, num_queries: int, features: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.dropout(self.norm(x))
        for layer in self.layers:
            x = layer(x, num_queries, features, mask)
        return x

    def _text_side(self) -> TextSide:
        if self.text is None:
            raise ValueError("this qformer has no text side; set text_vocab_size to the size of the text tokenizer")
        return self.text

    @torch.no_grad()
    def _start_from(self, source: str, sizes: dict[str, int]) -> None:
        bert = load_bert(source, sizes)
        embeddings = bert.base_model.embeddings
        self.norm.load_state_dict(embeddings.LayerNorm.state_dict())
        for layer, theirs in zip(self.layers, bert.base_model.encoder.layer, strict=True):
            for ours, module in _bert_pairs(layer, theirs):
                ours.load_state_dict(module.state_dict())
        if self.text is None:
            return
        positions = embeddings.position_embeddings.weight[: self.text.position_embedding.num_embeddings]
        self.text.word_embedding.weight.copy_(embeddings.word_embeddings.weight)
        self.text.position_embedding.weight.copy_(positions + embeddings.token_type_embeddings.weight[0])
        if isinstance(bert, BertForMaskedLM):
            head: Any = bert.cls.predictions
            self.text.head_proj.load_state_dict(head.transform.dense.state_dict())
            self.text.head_norm.load_state_dict(head.transform.LayerNorm.state_dict())
            self.text.head_bias.copy_(head.bias)


def visibility(attention_mask: Tensor, num_queries: int, causal: bool) -> Tensor:
    """Who may see whom among queries and text: int64 [N, T] -> bool [N, 1, K + T, K + T].

    Everyone sees itself, so that a text of nothing but padding gives numbers and not NaN.

    Source: arXiv 2301.12597, figure 2 (the masks of matching and captioning).
    """
    seen = F.pad(attention_mask.bool(), (num_queries, 0), value=True).unsqueeze(1)  # [N, 1, K + T]
    place = torch.arange(seen.shape[-1], device=seen.device)
    if causal:
        last = place.clamp(min=num_queries - 1)  # the last place that each one may look at
        seen = seen & (place <= last.unsqueeze(1))
    return (seen | (place == place.unsqueeze(1))).unsqueeze(1)


def load_bert(source: str, sizes: dict[str, int]) -> Any:
    """A BertForMaskedLM if the source was saved with that head, else a BertModel.

    Args:
        source: folder or Hub name.
        sizes: what is wanted, by the names of the connector's arguments; max_text and text_vocab_size may be left out.

    Raises:
        ValueError: nothing can be read, it is no BERT, it has other sizes, or some of its weights are missing.
    """
    config = _read(AutoConfig, source)
    _check_bert(source, config, sizes)
    has_head = WITH_HEAD & set(config.architectures or [])
    model, info = _read(
        BertForMaskedLM if has_head else BertModel,
        source,
        config=config,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # check_complete refuses them, and names the first
        **({} if has_head else {"add_pooling_layer": False}),
    )
    check_complete(model, info, source)
    return model


def _read(loader: Any, source: str, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(source, **arguments)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"qformer source {source!r} is neither a readable folder nor a Hub name ({first})") from error


def _check_bert(source: str, config: Any, sizes: dict[str, int]) -> None:
    if config.model_type != "bert" or config.hidden_act != "gelu":
        activation = getattr(config, "hidden_act", None)
        raise ValueError(
            f"qformer source {source!r} is of type {config.model_type!r} with activation {activation!r}; "
            "give a model of type 'bert' with 'gelu'"
        )
    theirs = {
        "hidden_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "mlp_dim": config.intermediate_size,
        "text_vocab_size": config.vocab_size,
    }
    if sizes.get("max_text", 0) > config.max_position_embeddings:
        theirs["max_text"] = config.max_position_embeddings
    for name, value in theirs.items():
        if sizes.get(name, value) != value:
            raise ValueError(f"qformer {name} is {sizes[name]} but source {source!r} has {value}; set {name}={value}")


def _bert_pairs(layer: Any, theirs: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Our modules beside those of a BertLayer that they start from."""
    attention = theirs.attention
    yield layer.attention.q_proj, attention.self.query
    yield layer.attention.k_proj, attention.self.key
    yield layer.attention.v_proj, attention.self.value
    yield layer.attention.o_proj, attention.output.dense
    yield layer.attention.norm, attention.output.LayerNorm
    for mlp in (layer.query_mlp, layer.text_mlp):
        if mlp is not None:
            yield mlp.up_proj, theirs.intermediate.dense
            yield mlp.down_proj, theirs.output.dense
            yield mlp.norm, theirs.output.LayerNorm


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"qformer {name} is {value}; at least 1 is needed")
    if sizes["hidden_dim"] % sizes["heads"]:
        raise ValueError(
            f"qformer hidden_dim {sizes['hidden_dim']} is not a multiple of heads {sizes['heads']}; change one of them"
        )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
