"""Which tests of peft's suite do not apply to FVAE-LoRA, each with the reason; everything else must pass."""

from __future__ import annotations

# Modules in which LoRA, and so FVAE-LoRA, is one of several methods or the example of one. The others are of one
# method each, or need a GPU, a library for quantisation, or files of the hub.
MODULES = (
    "test_config",
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_low_level_api",
    "test_mapping",
    "test_other",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_trainable_tokens",
    "test_tuners_utils",
    "test_vision_models",
)

# What our one-line refusals say, and why they are right. A test that ends in one is skipped.
REFUSALS = {
    r"adapter '.*' cannot be merged: its encoder has a ReLU": "only a linear encoder can be merged",
    r"is a \w*Embedding; only Linear, Conv1D and Conv2d": "embeddings are not adapted",
    r"is a (Conv1d|Conv3d|Conv2d with groups|MultiheadAttention|LayerNorm|GRU); only": "this layer is not adapted",
    r"has no attribute 'add_weighted_adapter'": "adapters that are not linear in x have no weighted sum",
    r"'FVAE_LORA' is not compatible with the `PeftMixedModel`": "PeftMixedModel has a fixed list of methods",
    r"bias must be 'none' with peft before 0.21": "peft before 0.21 does not save trained biases",
    r"'(0layers\.\.lin0|lin1)' matches no module of (DeepMLP|ModelEmbConv1D)": "each target must match something",
    r"has no attribute 'target_parameters'": "goes on to weighted sums, after what applies has passed",
    r"has no attribute '(lora_\w*|_register_custom_module)'": "reaches into LoRA's own layers",
    r"^'[\w.]*lora_[AB][\w.]*'$": "reads LoRA's parameters by name",
    r"Couldn't instantiate the backend tokenizer|Can't load (image processor|tokenizer)": "needs a file of the hub",
    r"requires the (Torchvision|PIL) library": "needs torchvision or Pillow",
    r"type object 'StableDiffusionPipeline' has no attribute": "needs a pipeline of the hub",
}

# Tests that compare outputs of a model in training mode, where the method samples: they run with z1 at its mean.
WITHOUT_NOISE = (
    r"TestPeftStateDict::test_get_and_set_peft_model_state_dict",
    r"TestModulesToSaveUnloadNoActiveAdapter",
)

# Tests in which three steps of SGD must move every parameter: the ELBO's weight of 1e-3 is too small for that.
HEAVIER_ELBO = (r"test_only_params_are_updated",)

# Tests whose SGD rate of 0.5 overflows fp32 in three steps; peft lowers it there for PVeRA, DoRA and others, by class.
LOWER_RATE = (r"test_parameters_after_loading_model",)

# Tests by a regular expression on path::class::name[case], and the reason.
NO_BIAS = "the model's class has no place for the bias that merging brings, as a warning says"
OWN_WORDS = "refused too, in words of our own"
LORAS_NAMES = "expects names of LoRA's classes, parameters or type"
EXCLUDED: dict[str, str] = {
    r"_pickle\b": "adapters are saved as safetensors; a pickle is never read",
    r"test_config.*(layers_to_transform_validation|regex_with_layer_indexing_lora)": OWN_WORDS,
    r"TestLoraNestedConfigRoundTrip": "nested configurations of LoRA's own",
    r"TestExcludedModuleNames::test_(no_modules_matched|second_adapter_only|some_modules_excluded)": OWN_WORDS,
    r"test_(module_type|adapter_model_type|peft_types|nb_params)_small": LORAS_NAMES,
    r"TestTunerStateDictKeyPrefixes": LORAS_NAMES,
    r"TestLayerRepr": LORAS_NAMES,
    r"TestRequiresGrad::test_requires_grad_(lora|modules_to_save|follows)": LORAS_NAMES,
    r"test_model_status_with_(modules_to_save|trainable_tokens)": LORAS_NAMES,
    r"TestMixedAdapterBatches::.*_raises": OWN_WORDS,
    r"test_save_pretrained_targeting_lora_to_embedding_layer": "embeddings are not adapted",
    r"test_save_pretrained_auto\[.*True\]": "asks the hub for the base model's vocabulary",
    r"::test_merge_layers\[.*(T5ForConditionalGeneration|DebertaModel)": NO_BIAS,
    r"TestLowLevelFunctional::test_(inject_adapter_in_model|modules_to_save)": LORAS_NAMES,
    r"test_mixed_model_raises": "PeftMixedModel has a fixed list of methods",
}
