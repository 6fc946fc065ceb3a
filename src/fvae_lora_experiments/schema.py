"""The schema of recipes: keys, defaults, what is allowed and what each key means."""

import math
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)


class DataSettings(Section):
    """Which rows are used for training, selection and test."""

    protocol: Literal["clean", "reported-on-validation", "reference", "reference-on-test"] = "clean"
    """`clean` takes a missing split from train, the same for every seed, and keeps the official test split whole; if
    none has known labels (as in GLUE), the official validation split is the test split.
    `reported-on-validation` selects on the official validation split and reports that score as the test score: common
    practice for GLUE, but optimistic because of the selection.
    `reference` splits like the reference implementation: differently for each seed, and it may halve the test split.
    `reference-on-test` selects on the test split itself, as the reference implementation does for SVHN."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The share of train used as validation split if there is none."""
    test_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share of train used as test split if there is none."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """The seed of splits that are taken from train, the same for every run."""
    config: str | None = None
    """The configuration of a data set on the hub, if it has several."""
    image_column: str | None = None
    """The column of the images; None means the first that holds images."""
    label_column: str | None = None
    """The column of the labels; None means the one that declares classes, or else `label` or `labels`."""
    classes: Annotated[list[str], Field(min_length=2)] | None = None
    """Names of the labels in the order of their numbers; None means those declared by the data, or found in train."""
    train_rows: Count | None = None
    """How many rows of the training split are used, drawn by class and group with the split seed; None means all."""
    validation_rows: Count | None = None
    """The same for the validation split."""
    group_column: str | None = None
    """The column with each row's group; each group is then scored by itself. None means no groups."""
    average: Literal["plain", "train-weighted"] = "plain"
    """How rows count in the accuracy on validation and test. `train-weighted` weights each group by its share of train,
    as is usual for Waterbirds, whose validation and test splits are balanced (Sagawa et al., 2020)."""
    select_by: Literal["accuracy", "worst_group_accuracy"] = "accuracy"
    """The validation score that selects the epoch; `accuracy` stands for the task's own metric."""

    @field_validator("average", "select_by")
    @classmethod
    def _needs_groups(cls, value: str, info: ValidationInfo) -> str:
        if value in ("train-weighted", "worst_group_accuracy") and info.data.get("group_column") is None:
            raise PydanticCustomError("no_groups", "input needs data.group_column")
        return value


class ImageSettings(Section):
    """How images are opened (in all splits) and augmented (in the training split only)."""

    range: tuple[float, float] | None = None
    """The values of black and white in images of more than 8 bits; None means the range of their type."""
    background: str = "white"
    """The background of transparent images: a colour's name, or `#rrggbb`."""

    augmentation: list[Literal["random_resized_crop", "horizontal_flip"]] = []
    """Random changes to an image each time it is trained on."""
    min_crop: Annotated[float, Field(gt=0, le=1)] = 0.08
    """The smallest share of an image's area that a random crop keeps."""
    size: Count | None = None
    """Height and width of the model's input, with interpolated position embeddings; None means the model's own."""

    @field_validator("range")
    @classmethod
    def _black_is_not_white(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] != value[1]):
            raise PydanticCustomError("range", "input should be two different numbers, those of black and white")
        return value

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, value: str) -> str:
        try:
            ImageColor.getrgb(value)
        except ValueError as error:
            raise PydanticCustomError("colour", "input should be a colour, such as white or #ffffff") from error
        return value


class CommonsenseSettings(Section):
    """Questions with options, answered by a causal language model."""

    template: Literal["alpaca", "chat"] = "alpaca"
    """The text around a question: the prompt commonly used to train base models, or the tokenizer's chat template."""
    test_sets: Annotated[list[str], Field(min_length=1)] | None = None
    """Which of the data set's test sets are scored; None means all."""
    max_new_tokens: Count = 32
    """The maximum length of a generated answer."""
    load_in_4bit: bool = False
    """Keeps the frozen weights in 4 bits (needs bitsandbytes)."""


class TextSettings(Section):
    """Which text of a row is read, and how the model is scored."""

    columns: Annotated[list[str], Field(min_length=1, max_length=2)] | None = None
    """The column of the text, or the two columns of a pair; None means `sentence` or `text`."""
    max_length: Count = 128
    """Rows are truncated to this number of tokens, special tokens included."""
    metrics: Annotated[list[Literal["accuracy", "f1", "matthews", "pearson", "spearman"]], Field(min_length=1)] = [
        "accuracy"
    ]
    """What is measured; the first selects the epoch. Correlations are for regression on numbers."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if len({metric in ("pearson", "spearman") for metric in self.metrics}) > 1:
            raise ValueError("classes have accuracy, f1 and matthews, numbers have pearson and spearman: not both")
        return self

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return self.metrics[0] in ("pearson", "spearman")


class SpeechSettings(Section):
    """The language of recordings, and the length of transcriptions."""

    language: str = "en"
    """The language of the recordings, for multilingual models; for example `en` or `english`."""
    max_new_tokens: Count = 225
    """The maximum length of a generated transcription."""


class TrainSettings(Section):
    """The optimisation."""

    epochs: Count = 30
    """Number of passes over the training split."""
    batch_size: Count = 32
    """Rows of a batch, divided among the processes of a run."""
    gradient_accumulation: Count = 1
    """Batches per optimizer step."""
    max_steps: Count | None = None
    """Optimizer steps after which training ends, however many epochs these are; None is `epochs`."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """`balanced` draws an epoch's rows with replacement, so that each class is as frequent as any other."""
    class_weights: Literal["balanced"] | Annotated[list[Weight], Field(min_length=2)] | None = None
    """How much a row counts in the training loss by its class, in the order of the classes: numbers, or `balanced` for
    one over the rows of each. They are scaled to 1 on average over train; other losses stay without them."""
    learning_rate: Positive = 5e-3
    """AdamW's learning rate after warm-up."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """How the learning rate changes after warm-up; `constant` has none."""
    warmup_ratio: Share = 0.1
    """The share of all steps during which the learning rate rises from 0."""
    weight_decay: Weight = 0.01
    """AdamW's weight decay."""
    max_grad_norm: Weight = 1.0
    """The norm that gradients are clipped to; 0 disables clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """The precision of computation; trained weights are always fp32. fp16 needs a GPU."""
    patience: Count | None = None
    """Training stops after this many epochs without a better validation score; None trains for all epochs."""
    log_every: Count = 50
    """Steps between two lines of the learning curve; the end of an epoch always gets one."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Processes that read the data; None means all cores but one, at most eight, with an accelerator, and 0 without.
    Random crops depend on the number."""
    cache_frozen: bool = False
    """Computes what precedes the first adapted block once, in eval mode, and trains on that (see `run.state_cache`)."""
    keep_checkpoints: bool = False
    """Keeps the last and the best checkpoint of a finished run, from which the command with more epochs goes on."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Trackers that get the learning curve, too; each must be installed."""

    @field_validator("class_weights", mode="wrap")
    @classmethod
    def _weighs_each_class(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            what = "input should be balanced, or a number from 0 up for each class"
            raise PydanticCustomError("class_weights", what) from error


class AdapterSettings(Section):
    """What is adapted; common to all adapter methods."""

    r: Count = 16
    """The rank; in FVAE-LoRA the dimension of z1."""
    alpha: Positive | None = None
    """The scale is alpha / r; None means r."""
    dropout: Share = 0.1
    """Dropout on the adapter's input."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Annotated[str, Field(min_length=1)] = ["query", "key"]
    """Names of the modules to adapt or, as in peft, `all-linear` or a regular expression for whole names."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """Which of the model's blocks are adapted, counted from 0; None means all."""


class FvaeSettings(Section):
    """The fields of `FVAELoraConfig` that `adapter` does not already set, under the same names."""

    residual_dim: Count | None = None
    """The dimension of z2; None means `adapter.r`."""
    encoder_hidden_dims: list[Count] | None = None
    """Widths of the encoders' hidden layers; None means [`adapter.r`], [] a linear encoder, which can be merged."""
    encoder_dropout: Share = 0.0
    """Dropout after each of the encoders' hidden layers."""
    shared_encoder_trunk: bool = True
    """Whether an encoder's mean and log-variance share the hidden layers."""
    decoder_hidden_dims: list[Count] = [128]
    """Widths of the decoder's hidden layers."""
    decoder_dropout: Share = 0.0
    """Dropout after each of the decoder's hidden layers."""
    latent_fusion: Literal["concat", "average"] = "concat"
    """What the decoder reads of z1 and z2; `average` needs them to have the same dimension."""
    residual_prior_mean: Annotated[float, Field(allow_inf_nan=False)] = 1.5
    """The mean of z2's prior, in every dimension."""
    residual_prior_std: Positive = 1.0
    """The standard deviation of z2's prior."""
    objective: Literal["fvae", "vae2lat", "reference"] = "fvae"
    """The paper's ELBO, a plain ELBO for both latents, or that of the reference implementation."""
    elbo_weight: Weight = 1e-3
    """lambda, the weight of the ELBO in the loss; at 0 encoder 2 and the decoder are neither built nor run."""
    reconstruction_weight: Weight = 1.0
    """alpha, the weight of the reconstruction."""
    kl_weight: Weight = 10.0
    """beta, the weight of the KL divergence of z1; with vae2lat, of both latents."""
    factorization_weight: Weight = 1.0
    """delta, the weight of the term that pushes the two latents apart."""
    factorization_weight_z1: Weight | None = None
    """The weight of that term's z1 part, with the objective `reference`; None means `factorization_weight`."""
    factorization_weight_z2: Weight | None = None
    """The weight of that term's z2 part, with the objective `reference`; None means `factorization_weight`."""
    task_weight: Positive = 1.0
    """The weight of the task loss, in training only."""
    layer_reduction: Literal["sum", "mean"] = "sum"
    """How the layers' ELBOs are combined."""
    elbo_stop_gradient: bool = False
    """Whether the ELBO's gradient stops at the layer's input, so that it does not change the layers below."""
    elbo_token_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The share of tokens on which the ELBO is estimated."""


class AblationSettings(Section):
    """What is removed from the FVAE-LoRA methods (see `ablation`)."""

    noise: bool = True
    """False fixes z1's standard deviation at its minimum, so that z1 is its mean in training, too."""
    start: Literal["method", "lora"] = "method"
    """`lora` starts like LoRA, with B at zero and z1's mean at random; `method` the other way round."""


WITHOUT_EFFECT = ("train.keep_checkpoints", "train.report_to")
"""Keys that change no number of a run: they may be others when it goes on, and tell no two runs apart."""


class Recipe(Section):
    """One run, completely: the same recipe with the same data and versions gives the same result."""

    task: Literal["image", "text", "commonsense", "phonemes", "transcription"] = "image"
    """What the model learns to do."""
    method: str = "fvae-lora"
    """How the model is adapted; `fvae-lora recipes` describes each method."""
    model: Annotated[str, Field(min_length=1)]
    """The pretrained model: a name on the hub or a folder."""
    dataset: Annotated[str, Field(min_length=1)]
    """The data: a name on the hub or a folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """The seed of everything random in a run, except for the splits."""
    purpose: Literal["result", "selection"] = "result"
    """`selection` is a point of a grid: it is scored on validation and never on test."""
    data: DataSettings = DataSettings()
    image: ImageSettings = ImageSettings()
    text: TextSettings = TextSettings()
    commonsense: CommonsenseSettings = CommonsenseSettings()
    speech: SpeechSettings = SpeechSettings()
    train: TrainSettings = TrainSettings()
    adapter: AdapterSettings = AdapterSettings()
    fvae: FvaeSettings = FvaeSettings()
    ablation: AblationSettings = AblationSettings()

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        by_class = [key for key in ("sampling", "class_weights") if getattr(self.train, key) not in ("uniform", None)]
        if by_class and (self.task not in ("image", "text") or (self.task == "text" and self.text.is_regression)):
            what = "a regression on numbers" if self.task == "text" else f"the task {self.task}"
            raise PydanticCustomError("no_classes", f"train.{by_class[0]}: {what} has no classes")
        return self

    @field_validator("method")
    @classmethod
    def _has_something_to_train(cls, value: str, info: ValidationInfo) -> str:
        if value == "linear-probe" and info.data.get("task") in ("commonsense", "transcription"):
            raise PydanticCustomError("no_head", "a model that generates text has no head to train")
        return value
