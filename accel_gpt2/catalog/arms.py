"""The arms of a comparison: which classifiers are set against each other, and how they differ.

3 and 5 differ in the objective, 5 and 6 in the backbone, 7a to 7c in how a likelihood is estimated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["classical", "zero_shot", "generative", "discriminative", "masked", "hybrid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSpec:
    """One entry of a comparison; an arm of several entries has a letter for each in `id`.

    `directory` is where its runs are, below the comparison's; entries that share one differ in how
    the same trained models are evaluated (`pll`). `name` and `description` may hold `{model}`,
    which stands for the recipe's model. `backbone` says which of the comparison's two models that
    is; None where nothing is loaded.
    """

    id: str
    arm: int
    kind: Kind
    name: str
    description: str
    directory: str
    backbone: Literal["model", "encoder"] | None
    trained: bool  # through the training loop, like any other run
    recipe_values: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    pll: Literal["full", "shared", "independent"] = "full"
    evaluation: str = "evaluation"  # the folder of its scores and metrics in a run directory


_MASKED_LM = MappingProxyType({"objective": "masked_lm"})

_ROWS = (
    ArmSpec(
        id="1a",
        arm=1,
        kind="classical",
        name="TF-IDF + logistic regression",
        description="A linear classifier on words and word pairs: what everything else has to "
        "beat.",
        directory="arm-1-tfidf",
        backbone=None,
        trained=False,
    ),
    ArmSpec(
        id="1b",
        arm=1,
        kind="classical",
        name="naive Bayes n-gram models",
        description="One n-gram language model per class and Bayes' rule: the classical generative "
        "classifier.",
        directory="arm-1-naive-bayes",
        backbone=None,
        trained=False,
    ),
    ArmSpec(
        id="2",
        arm=2,
        kind="zero_shot",
        name="{model} zero-shot",
        description="The pretrained {model}, untrained on this data: a document's likelihood after "
        "a prompt that names the class (Min et al. 2022, the channel model).",
        directory="arm-2-zero-shot",
        backbone="model",
        trained=False,
    ),
    ArmSpec(
        id="3",
        arm=3,
        kind="generative",
        name="{model} per class",
        description="One {model} language model per class, all weights trained, and Bayes' rule.",
        directory="arm-3-generative",
        backbone="model",
        trained=True,
    ),
    ArmSpec(
        id="4",
        arm=4,
        kind="generative",
        name="{model} LoRA per class",
        description="One LoRA adapter per class on one shared {model}, and Bayes' rule.",
        directory="arm-4-lora",
        backbone="model",
        trained=True,
        recipe_values=MappingProxyType({"finetuning": "lora"}),
    ),
    ArmSpec(
        id="5",
        arm=5,
        kind="discriminative",
        name="{model} with a head",
        description="One {model} with a classification head: the backbone of arm 3, trained to "
        "tell the classes apart.",
        directory="arm-5-classification",
        backbone="model",
        trained=True,
        recipe_values=MappingProxyType({"objective": "classification"}),
    ),
    ArmSpec(
        id="6",
        arm=6,
        kind="discriminative",
        name="{model} with a head",
        description="One {model} encoder with a classification head: the objective of arm 5 on "
        "another backbone.",
        directory="arm-6-encoder",
        backbone="encoder",
        trained=True,
        recipe_values=MappingProxyType({"objective": "classification"}),
    ),
    ArmSpec(
        id="7a",
        arm=7,
        kind="masked",
        name="{model}, own masks",
        description="One masked {model} per class; a document's pseudo-log-likelihood is estimated "
        "with random masks that are drawn anew for each class.",
        directory="arm-7-masked-lm",
        backbone="encoder",
        trained=True,
        recipe_values=_MASKED_LM,
        pll="independent",
        evaluation="evaluation-independent-masks",
    ),
    ArmSpec(
        id="7b",
        arm=7,
        kind="masked",
        name="{model}, shared masks",
        description="The models of 7a; the random masks of a document are the same for all "
        "classes.",
        directory="arm-7-masked-lm",
        backbone="encoder",
        trained=True,
        recipe_values=_MASKED_LM,
        pll="shared",
        evaluation="evaluation-shared-masks",
    ),
    ArmSpec(
        id="7c",
        arm=7,
        kind="masked",
        name="{model}, full PLL",
        description="The models of 7a; every token is masked once, alone (Salazar et al. 2020).",
        directory="arm-7-masked-lm",
        backbone="encoder",
        trained=True,
        recipe_values=_MASKED_LM,
    ),
    ArmSpec(
        id="8",
        arm=8,
        kind="hybrid",
        name="{model} hybrid",
        description="One {model} per class, trained together with a discriminative term (GeDi's "
        "loss, Krause et al. 2020), and Bayes' rule.",
        directory="arm-8-hybrid",
        backbone="model",
        trained=True,
        recipe_values=MappingProxyType({"objective": "hybrid"}),
    ),
)

ARMS: Mapping[str, ArmSpec] = MappingProxyType({row.id: row for row in _ROWS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Two entries that differ in one thing; the difference is the accuracy of `entry` less that of
    `against`. `in_verdict`: whether the verdict has a sentence about it."""

    topic: str
    question: str
    entry: str
    against: str
    in_verdict: bool = True


# In the order of the project's questions.
CONTRASTS = (
    Contrast(
        topic="Objective",
        question="a classification head or language models, on the same backbone?",
        entry="5",
        against="3",
    ),
    Contrast(
        topic="Backbone",
        question="the encoder or GPT-2, both with a head?",
        entry="6",
        against="5",
    ),
    Contrast(
        topic="Estimator",
        question="the same masks for all classes, or each its own?",
        entry="7b",
        against="7a",
    ),
    Contrast(
        topic="Estimator",
        question="every token masked once, alone, or random masks of each class's own?",
        entry="7c",
        against="7a",
    ),
    Contrast(
        topic="Architecture",
        question="causal language models, or masked ones with their best estimator?",
        entry="3",
        against="7c",
        in_verdict=False,
    ),
    Contrast(
        topic="LoRA",
        question="adapters on one shared base, or all weights?",
        entry="4",
        against="3",
    ),
    Contrast(
        topic="Discriminative term",
        question="beside the likelihood, or the likelihood alone?",
        entry="8",
        against="3",
    ),
    Contrast(
        topic="Language model",
        question="GPT-2 or n-gram counts, in the same Bayes' rule?",
        entry="3",
        against="1b",
        in_verdict=False,
    ),
    Contrast(
        topic="Training",
        question="on this data, or a prompt?",
        entry="3",
        against="2",
        in_verdict=False,
    ),
)

# What a LoRA arm stands on where there are no pretrained weights: one language model of all text.
BASE_DIRECTORY = "base"
BASE_VALUES: Mapping[str, object] = MappingProxyType({"objective": "unconditional"})
BASE_FINAL = "class-all/final"  # in its run directory
