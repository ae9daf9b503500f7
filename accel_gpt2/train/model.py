"""The model: built or loaded, adapted, and wrapped so that its forward pass is the loss."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.data.tokenizer import TextTokenizer, load_saved_tokenizer
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.failures import machine_failure
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.loss import chunked_cross_entropy, chunked_log_likelihoods
from accel_gpt2.train.manifest import verify
from accel_gpt2.train.weights import weights_are_cached, weights_location

# What transformers' decoder families call their dropout rates.
_DROPOUT_FIELDS = (
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "attention_dropout",
    "hidden_dropout",
)

# GPT-2's four projections are Conv1D, weight [in, out]; peft by default adapts only c_attn.
_GPT2_PROJECTIONS = ("c_attn", "c_proj", "c_fc")


class LanguageModel(nn.Module):
    """A causal LM of transformers whose forward pass returns the summed loss, never the logits.

    What is wrapped for training (DDP, autocast) is this module, so that the head's matrix product
    happens inside the wrapped forward pass.
    """

    def __init__(self, model: nn.Module, loss_chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.loss_chunk_tokens = loss_chunk_tokens

    @property
    def transformers_model(self) -> Any:
        """The PreTrainedModel, inside its adapter wrapper if there is one."""
        return self.model.get_base_model() if self._is_adapter else self.model  # type: ignore[operator]

    @property
    def _is_adapter(self) -> bool:
        return hasattr(self.model, "get_base_model")

    def forward(self, input_ids: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """Sum of the valid targets' negative log-likelihood in nats, fp32 scalar.

        Args:
            input_ids, targets: int64 [documents, longest]; `valid`: bool, same shape.
        """
        hidden, head = self._hidden(input_ids, valid)
        return chunked_cross_entropy(
            hidden, head.weight, head.bias, targets[valid], self.loss_chunk_tokens
        )

    @torch.no_grad()
    def document_log_likelihoods(self, input_ids: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
        """log p(document) of each row in nats, float64 [documents]; arguments as in `forward`."""
        hidden, head = self._hidden(input_ids, valid)
        per_token = chunked_log_likelihoods(
            hidden, head.weight, head.bias, targets[valid], self.loss_chunk_tokens
        )
        rows = valid.nonzero()[:, 0]
        totals = torch.zeros(len(input_ids), dtype=torch.float64, device=per_token.device)
        return totals.index_add_(0, rows, per_token.double())

    def _hidden(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, nn.Linear]:
        base = self.transformers_model
        # No attention mask: with right padding causal attention alone is exact, and the kernels
        # for is_causal are the fast ones.
        hidden = base.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden[valid], base.get_output_embeddings()

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained parameters by name, each tied pair once: what a checkpoint holds."""
        return {
            name: parameter.detach()
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    def save_pretrained(self, directory: Path) -> None:
        """Write the model, or its adapter, as transformers or peft loads it."""
        config = self.transformers_model.config
        config.use_cache = True  # for whoever generates text with it
        # peft would ask the hub whether the embedding has grown; ours never does.
        options = {"save_embedding_layers": False} if self._is_adapter else {}
        with quiet_transformers():
            self.model.save_pretrained(directory, **options)  # type: ignore[operator]
        config.use_cache = False

    def load_trainable_state(self, state: dict[str, Tensor], source: Path) -> None:
        """Copy the tensors of a checkpoint in place.

        Args:
            source: the checkpoint, for the message.

        Raises:
            UserError: when names or shapes are not this model's.
        """
        own = self.trainable_state()
        for name in sorted(own.keys() | state.keys()):
            if name not in own or name not in state or own[name].shape != state[name].shape:
                raise UserError(
                    f"{source} is not of this model: {name} is {_shape(state.get(name))} there and "
                    f"{_shape(own.get(name))} here. Give --resume with the path of another one, or "
                    "--resume never to start anew (what is there is kept beside)."
                )
            own[name].copy_(state[name])


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def build_model(recipe: TrainRecipe, *, vocab_size: int, eos_token_id: int) -> LanguageModel:
    """The recipe's model on the CPU in fp32, from weights or from the seed, adapter included.

    Args:
        vocab_size, eos_token_id: of the tokenizer that made the documents.

    Raises:
        UserError: when the weights cannot be had or do not go with the tokenizer, or the
            architecture computes its logits in a way that our loss does not reproduce.
    """
    model = (
        _pretrained(recipe)
        if recipe.init == "pretrained"
        else _from_scratch(recipe, vocab_size=vocab_size, eos_token_id=eos_token_id)
    )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise UserError(
            f"The tokenizer has {vocab_size} tokens and {recipe.model} embeds {rows}: they do not "
            "belong together; give --set tokenizer=auto."
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and recipe.max_length - 1 > positions:
        raise UsageError(
            f"max_length = {recipe.max_length}: {recipe.model} has {positions} positions; give "
            f"--max-length {positions} or less."
        )
    if recipe.gradient_checkpointing:
        _checkpoint_activations(model)
    if recipe.finetuning == "lora":
        model = _add_lora(model, recipe)
    wrapped = LanguageModel(model, recipe.loss_chunk_tokens)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"Nothing would be trained: {recipe.model} has no parameter that takes a gradient; "
            "check --set lora_target_modules."
        )
    _check_logits(wrapped, vocab_size)
    return wrapped


def load_final(directory: Path, recipe: TrainRecipe) -> LanguageModel:
    """A trained class from its `final/` directory, full or adapter, ready to score.

    Raises:
        UserError: when a file of it is missing or has changed, or the base cannot be had.
    """
    from transformers import AutoModelForCausalLM

    verify(directory)
    with _readable(f"model in {directory}"):
        if (directory / "adapter_config.json").is_file():
            from peft import PeftModel

            if not (directory / "adapter_model.safetensors").is_file():
                raise UserError(f"{directory} holds no adapter_model.safetensors.")
            location = weights_location(recipe.model)
            base = AutoModelForCausalLM.from_pretrained(
                location,
                **_LOADING,
                dtype=torch.float32,
                local_files_only=weights_are_cached(location),
            )
            _fuse_gelu(base.config, recipe)
            model: Any = PeftModel.from_pretrained(base, directory)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                directory, **_LOADING, dtype=torch.float32, local_files_only=True
            )
    return LanguageModel(model, recipe.loss_chunk_tokens).eval()


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


def _pretrained(recipe: TrainRecipe) -> Any:
    from transformers import AutoModelForCausalLM

    location = weights_location(recipe.model)
    with _readable(f"weights of {recipe.model}"):
        config = _read_config(location)
        _apply_recipe(config, recipe)
        return AutoModelForCausalLM.from_pretrained(
            location,
            config=config,
            **_LOADING,
            dtype=torch.float32,
            local_files_only=weights_are_cached(location),
        )


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


def _from_scratch(recipe: TrainRecipe, *, vocab_size: int, eos_token_id: int) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config

    row = MODELS.get(recipe.model)
    if row is not None:
        config: Any = GPT2Config(
            n_layer=row.n_layer,
            n_head=row.n_head,
            n_embd=row.n_embd,
            n_positions=row.n_positions,
        )
    else:
        with _readable(f"configuration of {recipe.model}"):
            config = _read_config(weights_location(recipe.model))
    config.vocab_size = vocab_size
    config.bos_token_id = config.eos_token_id = eos_token_id
    config.pad_token_id = None
    _apply_recipe(config, recipe)
    # Every class starts from the same weights: what differs afterwards is what its text taught.
    torch.manual_seed(recipe.seed)
    with _readable(f"configuration of {recipe.model}"):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
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


def _checkpoint_activations(model: Any) -> None:
    # Reentrant checkpointing silently drops the gradients of adapters on a frozen base.
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.23 and later
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _add_lora(model: Any, recipe: TrainRecipe) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    conv1d = any(isinstance(module, Conv1D) for module in model.modules())
    targets: Any = list(recipe.lora_target_modules)
    if not targets:
        targets = list(_GPT2_PROJECTIONS) if conv1d else "all-linear"
    torch.manual_seed(recipe.seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=recipe.lora_rank,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                target_modules=targets,
                fan_in_fan_out=conv1d,
            ),
        )
    except ValueError as error:
        raise UserError(f"LoRA found nothing to adapt in {recipe.model}: {error}") from error


@torch.no_grad()
def _check_logits(model: LanguageModel, vocab_size: int) -> None:
    """Our loss takes the head's product for the logits; refuse a model that does more to them."""
    base = model.transformers_model
    was_training = base.training
    base.eval()
    input_ids = torch.arange(8)[None] % vocab_size
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    log_probabilities = base(input_ids=input_ids, use_cache=False).logits.float().log_softmax(-1)
    expected = log_probabilities.gather(2, input_ids[:, :, None]).flatten()
    hidden, head = model._hidden(input_ids, valid)
    ours = chunked_log_likelihoods(hidden, head.weight, head.bias, input_ids[valid], len(hidden))
    base.train(was_training)
    if not torch.allclose(ours, expected, rtol=1e-4, atol=1e-3):
        raise UserError(
            f"{type(base).__name__} changes its logits after the output head (scaling or capping), "
            "which the chunked loss does not reproduce; choose another architecture."
        )
