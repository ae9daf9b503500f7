"""The model: built or loaded, adapted, and wrapped so that its forward pass is the loss."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.data.tokenizer import TextTokenizer, load_saved_tokenizer
from accel_gpt2.data.weights import weights_are_cached, weights_location
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.failures import machine_failure
from accel_gpt2.recipe import Objective, TrainRecipe
from accel_gpt2.recipe.rules import dora_dropout_problem
from accel_gpt2.train.bf16 import cast_to_bf16
from accel_gpt2.train.causal import LanguageModel
from accel_gpt2.train.classifier import DocumentClassifier
from accel_gpt2.train.hybrid import HybridLanguageModels
from accel_gpt2.train.manifest import verify
from accel_gpt2.train.masked import MaskedLanguageModel, PllEstimator
from accel_gpt2.train.objective import TrainedModel, TransformersModel
from accel_gpt2.train.quantized import quantization_config, restore_quantized, settle

# What transformers' decoder families call their dropout rates.
_DROPOUT_FIELDS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "hidden_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout_prob",
    "classifier_dropout",
)

# GPT-2's four projections are Conv1D, weight [in, out]; peft by default adapts only c_attn.
_GPT2_PROJECTIONS = ("c_attn", "c_proj", "c_fc")


# RoBERTa and its kin count positions from behind their padding token's id.
_POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet")

_AUTO_CLASSES: dict[Objective, str] = {
    "generative": "AutoModelForCausalLM",
    "hybrid": "AutoModelForCausalLM",
    "unconditional": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classification": "AutoModelForSequenceClassification",
}


def build_model(
    recipe: TrainRecipe,
    *,
    vocab_size: int,
    eos_token_id: int,
    mask_token_id: int | None = None,
    pad_token_id: int | None = None,
    class_names: Sequence[str] = (),
    log_prior: NDArray[np.float64] | None = None,
    mean_tokens: float = 1.0,
) -> TrainedModel:
    """The recipe's model on the CPU, from weights or from the seed, adapter included.

    It is fp32, and bf16 with `mixed_precision = "pure_bf16"`. With a quantised base
    (`finetuning = "qlora"`) it is on this process's GPU, if there is one.

    Args:
        vocab_size, eos_token_id, mask_token_id, pad_token_id: of the tokenizer that made the
            documents.
        class_names: for a classification head, and as many models as a hybrid trains.
        log_prior, mean_tokens: for a hybrid, see `HybridLanguageModels`.

    Raises:
        UserError: when the weights cannot be had or do not go with the tokenizer or the objective,
            or the architecture computes its logits in a way that our loss does not reproduce.
    """
    tokens = _Tokens(
        vocab_size=vocab_size,
        eos_token_id=eos_token_id,
        mask_token_id=mask_token_id,
        pad_token_id=pad_token_id,
    )
    model: TrainedModel
    match recipe.objective:
        case "hybrid":
            assert log_prior is not None, "a hybrid weighs its classes"
            model = HybridLanguageModels(
                [_language_model(recipe, tokens) for _ in class_names],
                discriminative_weight=recipe.discriminative_weight,
                log_prior=log_prior,
                mean_tokens=mean_tokens,
            )
        case "masked_lm":
            model = _wrap(_transformers_model(recipe, tokens), recipe, tokens)
        case "classification":
            model = _wrap(_transformers_model(recipe, tokens, class_names), recipe, tokens)
        case _:
            model = _language_model(recipe, tokens)
    if recipe.mixed_precision == "pure_bf16":
        cast_to_bf16(model)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """What a model has to know of its tokenizer."""

    vocab_size: int
    eos_token_id: int
    mask_token_id: int | None
    pad_token_id: int | None


def _language_model(recipe: TrainRecipe, tokens: _Tokens) -> LanguageModel:
    wrapped = _wrap(_transformers_model(recipe, tokens), recipe, tokens)
    assert isinstance(wrapped, LanguageModel), recipe.objective
    _check_logits(wrapped, tokens.vocab_size)
    return wrapped


def _transformers_model(
    recipe: TrainRecipe, tokens: _Tokens, class_names: Sequence[str] = ()
) -> Any:
    model = (
        _pretrained(recipe, tokens, class_names)
        if recipe.init == "pretrained"
        else _from_scratch(recipe, tokens, class_names)
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < tokens.vocab_size:
        raise UserError(
            f"The tokenizer has {tokens.vocab_size} tokens and {recipe.model} embeds {rows}: they "
            "do not belong together; give --set tokenizer=auto."
        )
    _check_positions(model.config, recipe)
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model, recipe)
    if recipe.finetuning != "full":
        model = _add_lora(model, recipe)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"Nothing would be trained: {recipe.model} has no parameter that takes a gradient; "
            "check --set lora_target_modules."
        )
    return model


def _check_positions(config: Any, recipe: TrainRecipe) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    longest = positions  # a causal model never reads EOS, so a document has one token more
    if recipe.objective in {"generative", "hybrid", "unconditional"}:
        longest += 1
    if any(name in config.model_type for name in _POSITIONS_AFTER_PADDING):
        longest -= 1 + (config.pad_token_id or 0)
    if recipe.max_length > longest:
        raise UsageError(
            f"max_length = {recipe.max_length}: {recipe.model} has {positions} positions; give "
            f"--max-length {longest} or less."
        )


def _wrap(
    model: Any,
    recipe: TrainRecipe,
    tokens: _Tokens | None,
    *,
    estimator: PllEstimator | None = None,
) -> TransformersModel:
    """The model with the loss and the scores of the recipe's objective; a causal LM needs no
    tokens."""
    match recipe.objective:
        case "masked_lm":
            assert tokens is not None
            return MaskedLanguageModel(
                model,
                mask_token_id=_needed(tokens.mask_token_id, "mask", recipe),
                pad_token_id=_needed(tokens.pad_token_id, "pad", recipe),
                micro_batch_tokens=recipe.micro_batch_tokens,
                estimator=estimator
                # One pass each, and the same tokens for all classes: enough to watch a training.
                or PllEstimator(
                    kind="shared", mask_fraction=recipe.mask_fraction, seed=recipe.seed
                ),
            )
        case "classification":
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            # The decoders of transformers call their classification head `score`.
            is_encoder = not hasattr(base, "score")
            pad = base.config.pad_token_id  # by which a decoder finds a document's last token
            if is_encoder:
                assert tokens is not None
                pad = _needed(tokens.pad_token_id, "pad", recipe)
            return DocumentClassifier(model, pad_token_id=pad, is_encoder=is_encoder)
        case _:
            return LanguageModel(model, recipe.loss_chunk_tokens)


def _needed(token_id: int | None, name: str, recipe: TrainRecipe) -> int:
    if token_id is None:
        raise UserError(
            f"objective = {recipe.objective!r} with {recipe.model} needs a tokenizer with a {name} "
            f"token, and this one has none; give --set tokenizer=DIRECTORY, or --model "
            "roberta-tiny."
        )
    return token_id


def load_final(
    directory: Path,
    recipe: TrainRecipe,
    *,
    class_names: Sequence[str] = (),
    pll: PllEstimator | None = None,
    base: Any | None = None,
) -> TransformersModel:
    """A trained model from its `final/` directory, full or adapter, ready to score.

    Args:
        class_names: of a classification head.
        pll: how a masked LM scores; None for the full pseudo-log-likelihood.
        base: what an adapter is put on, from `load_base`; None reads it.

    Raises:
        UserError: when a file of it is missing or has changed, or the base cannot be had.
    """
    verify(directory)
    # GPT-2's tokenizer takes half a second to read, for each class.
    reads_tokens = recipe.objective in {"masked_lm", "classification"}
    tokens = _final_tokens(directory) if reads_tokens else None
    with _readable(f"model in {directory}"):
        if is_adapter(directory):
            from peft import PeftModel

            if base is None:
                base = _read_base(recipe, tokens, class_names)
            model: Any = PeftModel.from_pretrained(base, directory)
        else:
            auto_class = _auto_class(recipe)
            model = auto_class.from_pretrained(
                directory, **_LOADING, dtype=torch.float32, local_files_only=True
            )
    wrapped = _wrap(model, recipe, tokens, estimator=pll or PllEstimator()).eval()
    if recipe.mixed_precision == "pure_bf16":
        cast_to_bf16(wrapped)  # an adapter's base was bf16 when the adapter was trained
    return wrapped


def load_merged(directory: Path, recipe: TrainRecipe, *, class_names: Sequence[str] = ()) -> Any:
    """A trained model from its `final/` directory as a plain PreTrainedModel on the CPU.

    It has the precision that it was trained in; an adapter is merged in fp32 into the base that it
    was trained on, dequantised or rounded to bf16.

    Raises:
        UserError: as `load_final`.
    """
    verify(directory)
    with _readable(f"model in {directory}"):
        if not is_adapter(directory):
            return _auto_class(recipe).from_pretrained(
                directory, **_LOADING, dtype="auto", local_files_only=True
            )
        from peft import PeftModel

        tokens = _final_tokens(directory)
        base = _read_base(dataclasses.replace(recipe, finetuning="lora"), tokens, class_names)
        if recipe.finetuning == "qlora":
            restore_quantized(base, _read_base(recipe, tokens, class_names))
        if recipe.mixed_precision == "pure_bf16":
            base.bfloat16().float()
        return PeftModel.from_pretrained(base, directory).merge_and_unload(safe_merge=True)


def is_adapter(directory: Path) -> bool:
    """Whether a `final/` directory holds an adapter, and not a whole model.

    Raises:
        UserError: when it says so and its weights are missing.
    """
    if not (directory / "adapter_config.json").is_file():
        return False
    if not (directory / "adapter_model.safetensors").is_file():
        raise UserError(f"{directory} holds no adapter_model.safetensors.")
    return True


def _final_tokens(directory: Path) -> _Tokens:
    tokenizer = load_saved_tokenizer(directory)
    return _Tokens(
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def load_base(recipe: TrainRecipe) -> Any:
    """What the adapters of several classes were trained on, frozen, for `load_final`.

    Raises:
        UserError: when it cannot be had.
    """
    with _readable(f"weights of {recipe.model}"):
        return _read_base(recipe, None, ()).requires_grad_(False)


def load_final_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer beside a trained class: the one in the run directory has no manifest.

    Raises:
        UserError: when a file of `final/` is missing or has changed.
    """
    verify(directory)
    return load_saved_tokenizer(directory)


_LOADING: dict[str, Any] = {
    "trust_remote_code": False,
    "use_safetensors": True,
}


def _auto_class(recipe: TrainRecipe) -> Any:
    import transformers

    return getattr(transformers, _AUTO_CLASSES[recipe.objective])


def _pretrained(recipe: TrainRecipe, tokens: _Tokens, class_names: Sequence[str]) -> Any:
    location = weights_location(recipe.model)
    with _readable(f"weights of {recipe.model}"):
        config = _read_config(location)
        _apply_recipe(config, recipe)
        _set_tokens(config, tokens, recipe, class_names)
        torch.manual_seed(recipe.seed)  # a classification head is new
        return _read_weights(location, config, recipe)


def _read_weights(location: str, config: Any, recipe: TrainRecipe) -> Any:
    """The published model, in fp32 or its linear layers quantised."""
    auto_class = _auto_class(recipe)
    quantized = recipe.finetuning == "qlora"
    quantization = None
    if quantized:
        with torch.device("meta"):
            shell = auto_class.from_config(config, trust_remote_code=False)
        quantization = quantization_config(shell, recipe)
    model = auto_class.from_pretrained(
        location,
        config=config,
        quantization_config=quantization,
        **_LOADING,
        dtype=torch.float32,
        local_files_only=weights_are_cached(location),
    )
    if quantized:
        settle(model, recipe)
    return model


def _read_base(recipe: TrainRecipe, tokens: _Tokens | None, class_names: Sequence[str]) -> Any:
    """The published model as adapters are scored on it; tokens are for a classification head."""
    location = weights_location(recipe.model)
    config = _read_config(location)
    _fuse_gelu(config, recipe)
    if tokens is not None:
        _set_tokens(config, tokens, recipe, class_names)
    return _read_weights(location, config, recipe)


def _set_tokens(
    config: Any, tokens: _Tokens, recipe: TrainRecipe, class_names: Sequence[str]
) -> None:
    """What a classification head reads from the configuration."""
    if recipe.objective != "classification":
        return
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    config.problem_type = "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        # The last token that is not EOS, and so not padding, is where a decoder is read.
        config.pad_token_id = tokens.eos_token_id


def _read_config(location: str) -> Any:
    from transformers import AutoConfig

    # What is here is taken without asking the hub, which costs 46 s of retries without a network.
    return AutoConfig.from_pretrained(
        location, trust_remote_code=False, local_files_only=weights_are_cached(location)
    )


@contextlib.contextmanager
def _readable(what: str) -> Iterator[None]:
    """Within it the library reads files that somebody made, and nothing of ours runs."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # whatever the many model classes raise on what they cannot use
        if isinstance(error, UserError) or machine_failure(error) is not None:
            raise
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise UserError(
            f"The {what} cannot be loaded ({reason[:300] or 'no reason is given'}); check that "
            "config.json and the weights are whole and belong together."
        ) from error


def _from_scratch(recipe: TrainRecipe, tokens: _Tokens, class_names: Sequence[str]) -> Any:
    with _readable(f"configuration of {recipe.model}"):
        config = fresh_config(recipe, pad_token_id=tokens.pad_token_id)
    config.vocab_size = tokens.vocab_size
    config.bos_token_id = config.eos_token_id = tokens.eos_token_id
    config.pad_token_id = tokens.pad_token_id
    _apply_recipe(config, recipe)
    _set_tokens(config, tokens, recipe, class_names)
    # Every class starts from the same weights: what differs afterwards is what its text taught.
    torch.manual_seed(recipe.seed)
    auto_class = _auto_class(recipe)
    with _readable(f"configuration of {recipe.model}"):
        return auto_class.from_config(config, dtype=torch.float32, trust_remote_code=False)


def fresh_config(recipe: TrainRecipe, *, pad_token_id: int | None) -> Any:
    """The configuration of transformers that says the model's shape; nothing else is settled."""
    from transformers import GPT2Config, RobertaConfig

    row = MODELS.get(recipe.model)
    if row is None:
        return _read_config(weights_location(recipe.model))
    if row.model_type == "gpt2":
        return GPT2Config(
            n_layer=row.n_layer, n_head=row.n_head, n_embd=row.n_embd, n_positions=row.n_positions
        )
    return RobertaConfig(
        num_hidden_layers=row.n_layer,
        num_attention_heads=row.n_head,
        hidden_size=row.n_embd,
        intermediate_size=4 * row.n_embd,
        # It counts from behind the id of the padding token.
        max_position_embeddings=row.n_positions + 1 + (pad_token_id or 0),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


def _apply_recipe(config: Any, recipe: TrainRecipe) -> None:
    config.use_cache = False
    for field in _DROPOUT_FIELDS:
        if hasattr(config, field):
            setattr(config, field, recipe.dropout)
    _fuse_gelu(config, recipe)


def _fuse_gelu(config: Any, recipe: TrainRecipe) -> None:
    # gelu_new is written as seven operations, most of whose results autograd keeps for backward;
    # gelu_pytorch_tanh is the same function, up to rounding, in one kernel that keeps its input.
    if recipe.fused_gelu and getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"


def _checkpoint_activations(model: Any, recipe: TrainRecipe) -> None:
    # Reentrant checkpointing silently drops the gradients of adapters on a frozen base.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 and later
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if recipe.checkpointed_layers is None:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
    if recipe.checkpointed_layers > len(blocks):
        raise UsageError(
            f"checkpointed_layers = {recipe.checkpointed_layers}: {recipe.model} has "
            f"{len(blocks)} blocks that can be checkpointed; give --set "
            f"checkpointed_layers={len(blocks)} or less, or leave it out for all."
        )
    # The first ones: when the backward pass comes to them, what the last ones keep is gone.
    for block in blocks[recipe.checkpointed_layers :]:
        block.gradient_checkpointing = False


# A classification head is trained whole beside the adapter; peft has no task for masked LMs.
_LORA_TASKS: dict[Objective, str] = {
    "generative": "CAUSAL_LM",
    "unconditional": "CAUSAL_LM",
    "classification": "SEQ_CLS",
}


def _add_lora(model: Any, recipe: TrainRecipe) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    # A 4-bit layer remembers what it stands for.
    layers = (getattr(module, "source_cls", type(module)) for module in model.modules())
    conv1d = Conv1D in layers
    if recipe.use_dora and recipe.lora_dropout > 0 and conv1d and recipe.finetuning == "lora":
        raise UsageError(dora_dropout_problem(recipe))
    targets: Any = list(recipe.lora_target_modules)
    if not targets:
        targets = list(_GPT2_PROJECTIONS) if conv1d else "all-linear"
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type=_LORA_TASKS.get(recipe.objective),
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        fan_in_fan_out=conv1d,
        use_dora=recipe.use_dora,
    )
    try:
        with quiet_transformers():
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA found nothing to adapt in {recipe.model}: {error}") from error


@torch.no_grad()
def _check_logits(model: LanguageModel, vocab_size: int) -> None:
    """Our loss takes the head's product of causal states for the logits: refuse what does not."""
    base = model.transformers_model
    was_training = base.training
    base.eval()
    input_ids = torch.arange(8, device=base.device)[None] % vocab_size
    other_end = input_ids.clone()
    other_end[0, -1] = (other_end[0, -1] + 1) % vocab_size
    log_probabilities, with_other_end = (
        base(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        for ids in (input_ids, other_end)
    )
    expected = log_probabilities.gather(2, input_ids[:, :, None]).flatten()
    positions = torch.arange(input_ids.numel(), device=base.device)
    ours = model.token_log_likelihoods(input_ids, input_ids[0], positions)
    base.train(was_training)
    # Random weights hardly look anywhere, so that what they see of the end is small too.
    if not torch.allclose(log_probabilities[:, :-1], with_other_end[:, :-1], rtol=0, atol=2e-6):
        raise UserError(
            f"{type(base).__name__} sees the tokens to the right of the one that it predicts, so "
            "it gives no likelihood from left to right; give --set objective=masked_lm or "
            "objective=classification, or a causal model."
        )
    if not torch.allclose(ours, expected, rtol=1e-4, atol=1e-3):
        raise UserError(
            f"{type(base).__name__} changes its logits after the output head (scaling or capping), "
            "which the chunked loss does not reproduce; choose another architecture."
        )
