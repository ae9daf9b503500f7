"""The run's README: a model card that says what was trained on what, and how well it does."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from accel_gpt2.catalog.datasets import DATASETS
from accel_gpt2.classify.spending import spent_usd
from accel_gpt2.recipe import Objective, TrainRecipe
from accel_gpt2.units import format_count, format_seconds

_TEMPLATE = """\
# {{ recipe.dataset }}: {{ title }}

{{ promise }}

- Classes: {% for name in plan.class_names -%}
{{ name }} ({{ plan.class_counts[loop.index0] }} training documents){{ ", " if not loop.last }}
{%- endfor %}
- Model: {{ recipe.model }}, {{ count(plan.num_parameters) }} parameters \
({{ count(plan.num_trainable_parameters) }} trained), {{ recipe.finetuning }} fine-tuning from \
{{ "published" if recipe.init == "pretrained" else "random" }} weights
- Text: {{ plan.data_source }}; at most {{ recipe.max_length }} tokens of a document are read
{%- if licence %}
- Licence of the text: {{ licence }}
{%- endif %}
{%- if spent_usd %}
- Paid for machines until now: ${{ "%.2f"|format(spent_usd) }}, as `spent.json` says
{%- endif %}
- Seed {{ recipe.seed }}; the whole recipe is in `recipe.yaml`, versions in `environment.json`

## Result
{% if metrics %}
On {{ metrics.num_documents }} documents of the {{ metrics.split }} split of {{ metrics.dataset }}:

| | accuracy | 95% interval | macro-F1 |
|---|---|---|---|
| this classifier | {{ "%.4f"|format(metrics.accuracy) }} | \
{{ "%.4f to %.4f"|format(*metrics.accuracy_interval_95) }} | {{ "%.4f"|format(metrics.macro_f1) }} |
{%- if metrics.baseline %}
| {{ metrics.baseline.name }} | {{ "%.4f"|format(metrics.baseline.accuracy) }} | \
{{ "%.4f to %.4f"|format(*metrics.baseline.accuracy_interval_95) }} | \
{{ "%.4f"|format(metrics.baseline.macro_f1) }} |
{%- endif %}
| majority class | {{ "%.4f"|format(metrics.majority_class_accuracy) }} | | |

Training took {{ duration(metrics.training.seconds) }} for \
{{ count(metrics.training.document_tokens) }} document tokens\
{% if metrics.training.cost_usd is not none %} and \
${{ "%.2f"|format(metrics.training.cost_usd) }}{% endif %}. \
Pictures are in `evaluation/report.html`.
{% else %}
Not evaluated yet: type `accel-gpt2 evaluate {{ directory }}`.
{% endif %}
## Use

    accel-gpt2 predict {{ directory }} "some text"

Each `class-*/final/` is a model that transformers{{ "/peft" if recipe.finetuning != "full" }} loads
as it is. {{ use }}
{%- if recipe.finetuning == "qlora" %}

The adapters were trained on a base in 4 bits and are scored on it. `from_pretrained` of peft's
`AutoPeftModel...` makes the same one with

    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
{%- endif %}

## Limits

The classes are those of the training text, and so are its biases. Calibrated probabilities are
fitted on held-out training data and hold for text like it; raw ones of a generative classifier are
far too sure.
"""

# Title, promise and use by objective.
_BAYES = (
    "A generative classifier: each class has a language model, a document goes to the class under "
    "which it is most probable (Bayes' rule, {priors} priors)."
)
_SUM = "Score BOS, the text's tokens and EOS; the likelihood is the sum over all tokens after BOS."
_WORDS: Mapping[Objective, tuple[str, str, str]] = {
    "generative": ("one {model} language model per class", _BAYES, _SUM),
    "hybrid": (
        "one {model} language model per class, trained together",
        _BAYES + " The models were trained to tell the classes apart as well (GeDi's loss, weight "
        "{discriminative_weight:g}).",
        _SUM,
    ),
    "masked_lm": (
        "one {model} masked language model per class",
        _BAYES + " A document's probability is its pseudo-log-likelihood: the sum over its tokens "
        "of the log-probability of each, given all others.",
        "Mask the text's tokens one at a time, between BOS and EOS.",
    ),
    "classification": (
        "{model} with a classification head",
        "A discriminative classifier: one model of all classes, trained for p(class | document).",
        "Give it BOS, the text's tokens and EOS.",
    ),
    "unconditional": (
        "one {model} language model of all classes",
        "No classifier: a base on which adapters of each class are trained.",
        _SUM,
    ),
}


def write_card(
    run_directory: Path,
    recipe: TrainRecipe,
    plan: dict[str, Any],
    *,
    metrics: dict[str, Any] | None,
) -> None:
    """Write `README.md` into the run directory; `metrics` is None before the evaluation."""
    row = DATASETS.get(recipe.dataset)
    title, promise, use = (
        text.format(**dataclasses.asdict(recipe)) for text in _WORDS[recipe.objective]
    )
    template = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(_TEMPLATE)
    text = template.render(
        recipe=recipe,
        title=title,
        promise=promise,
        use=use,
        plan=plan,
        metrics=metrics,
        licence=None if row is None else row.licence,
        directory=run_directory,
        spent_usd=spent_usd(run_directory),
        count=format_count,
        duration=format_seconds,
    )
    (run_directory / "README.md").write_text(text, encoding="utf-8")
