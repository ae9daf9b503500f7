"""Model sizes that are known by name; any other directory or hub id is loaded as it is.

Names of the fields are those of Hugging Face's `GPT2Config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

# other: of about this shape, read from a folder; no row is one.
ModelType = Literal["gpt2", "roberta", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One shape of GPT-2 or, to compare with, of RoBERTa.

    `n_positions` are the tokens that a document may have, `hub_id` is None where no pretrained
    weights exist. `recipe_defaults` are the recipe values that this row changes: a model from
    random weights wants another learning rate than a pretrained one.
    """

    name: str
    model_type: ModelType = "gpt2"
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    hub_id: str | None
    source: str
    recipe_defaults: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def num_parameters(self) -> int:
        """Exact count of the language model with the tied head.

        Token and position embeddings, blocks, a LayerNorm; RoBERTa has two more positions, a token
        type, and a head with a layer and a bias of its own.

        >>> MODELS["gpt2"].num_parameters, MODELS["gpt2-xl"].num_parameters
        (124439808, 1557611200)
        >>> MODELS["roberta-base"].num_parameters
        124697433
        """
        d = self.n_embd
        shared = (self.vocab_size + self.n_positions) * d + self.n_layer * (12 * d * d + 13 * d)
        if self.model_type == "gpt2":
            return shared + 2 * d
        return shared + (2 + 1) * d + 2 * d + (d * d + d) + 2 * d + self.vocab_size


# Small models from random weights: a vocabulary of the text itself, a high learning rate, and many
# small steps, because a class has seldom a million tokens. No dropout: they see little text often
# enough to learn it and seldom enough not to memorise it, and random numbers cost a CPU a fifth.
_FROM_SCRATCH = MappingProxyType(
    {
        "init": "scratch",
        "tokenizer": "train",
        "max_length": 128,
        "learning_rate": 2e-3,
        "dropout": 0.0,
        "global_batch_tokens": 512,
        "weight_decay": 0.1,
        "epochs": 4.0,
    }
)

_HUB = "huggingface.co/openai-community"

_ROWS = (
    ModelSpec(
        name="gpt2-tiny",
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_positions=512,
        vocab_size=4096,
        hub_id=None,
        source="ours: a demo of minutes on two CPU cores",
        recipe_defaults=_FROM_SCRATCH,
    ),
    ModelSpec(
        name="gpt2-mini",
        n_layer=4,
        n_head=8,
        n_embd=256,
        n_positions=512,
        vocab_size=8192,
        hub_id=None,
        source="ours: an hour of AG News on two CPU cores",
        recipe_defaults=MappingProxyType(
            {
                **_FROM_SCRATCH,
                "tokenizer_vocab_size": 8192,
                "max_length": 256,
                "global_batch_tokens": 2048,
            }
        ),
    ),
    ModelSpec(
        name="distilgpt2",
        n_layer=6,
        n_head=12,
        n_embd=768,
        n_positions=1024,
        vocab_size=50257,
        hub_id="distilbert/distilgpt2",
        source="huggingface.co/distilbert/distilgpt2 config.json",
    ),
    ModelSpec(
        name="gpt2",
        n_layer=12,
        n_head=12,
        n_embd=768,
        n_positions=1024,
        vocab_size=50257,
        hub_id="openai-community/gpt2",
        source=f"{_HUB}/gpt2 config.json",
    ),
    ModelSpec(
        name="gpt2-medium",
        n_layer=24,
        n_head=16,
        n_embd=1024,
        n_positions=1024,
        vocab_size=50257,
        hub_id="openai-community/gpt2-medium",
        source=f"{_HUB}/gpt2-medium config.json",
    ),
    ModelSpec(
        name="gpt2-large",
        n_layer=36,
        n_head=20,
        n_embd=1280,
        n_positions=1024,
        vocab_size=50257,
        hub_id="openai-community/gpt2-large",
        source=f"{_HUB}/gpt2-large config.json",
    ),
    ModelSpec(
        name="gpt2-xl",
        n_layer=48,
        n_head=25,
        n_embd=1600,
        n_positions=1024,
        vocab_size=50257,
        hub_id="openai-community/gpt2-xl",
        source=f"{_HUB}/gpt2-xl config.json",
    ),
    ModelSpec(
        name="roberta-tiny",
        model_type="roberta",
        n_layer=2,
        n_head=4,
        n_embd=128,
        n_positions=512,
        vocab_size=4096,
        hub_id=None,
        source="ours: gpt2-tiny's size, to compare with it",
        # LayerNorm after each block wants smaller steps than GPT-2's before it (docs/log.md).
        recipe_defaults=MappingProxyType({**_FROM_SCRATCH, "learning_rate": 5e-4}),
    ),
    *(
        ModelSpec(
            name=name,
            model_type="roberta",
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            n_positions=512,
            vocab_size=50265,
            hub_id=hub_id,
            source=f"huggingface.co/{hub_id} config.json",
            recipe_defaults=MappingProxyType({"max_length": 512}),
        )
        for name, n_layer, n_head, n_embd, hub_id in (
            ("distilroberta-base", 6, 12, 768, "distilbert/distilroberta-base"),
            ("roberta-base", 12, 12, 768, "FacebookAI/roberta-base"),
            ("roberta-large", 24, 16, 1024, "FacebookAI/roberta-large"),
        )
    ),
)

MODELS: Mapping[str, ModelSpec] = MappingProxyType({row.name: row for row in _ROWS})
