"""TransformerLens' module paths and names, and where each lives in fastlens: two tables.

Paths are those of TransformerLens 3.9, and of 2.x where they differ. What is not here stands with
its reason in `fastlens.compat.missing`.
"""

import functools

# Module of fastlens -> the names that live there; "theirs=ours" where ours is called differently.
HOMES: dict[str, str] = {
    "fastlens.analysis.direct_path_patching": """get_act_patch_direct_path
        get_act_patch_direct_path_all_sources""",
    "fastlens.analysis.head_detector": """CACHE_WITH_SEQ_LIST_ERR DET_PAT_NOT_SQUARE_ERR
        ErrorMeasure HEAD_NAMES HeadName INVALID_HEAD_NAME_ERR LayerHeadTuple LayerToHead
        SEQ_LEN_ERR compute_head_attention_similarity_score detect_head
        get_duplicate_token_head_detection_pattern get_induction_head_detection_pattern
        get_previous_token_head_detection_pattern get_supported_heads""",
    "fastlens.analysis.svd_interpreter": "OUTPUT_EMBEDDING SVDInterpreter VECTOR_TYPES",
    "fastlens.cache": "ActivationCache",
    "fastlens.compat.components": """ActivationFunctionFactory DeviceType Loss LossPerToken
        MLPFactory RMSNormInput SingleLoss TensorLike""",
    "fastlens.compat.loading_from_pretrained": """Config NEED_REMOTE_CODE_MODELS
        NON_HF_HOSTED_MODEL_NAMES PYTHIA_CHECKPOINTS PYTHIA_V0_CHECKPOINTS
        STANFORD_CRFM_CHECKPOINTS convert_hf_model_config convert_neel_model_config
        get_basic_config get_checkpoint_labels get_num_params_of_pretrained
        get_official_model_name get_pretrained_model_config get_pretrained_state_dict
        make_model_alias_map""",
    "fastlens.compat.supported_models": "DEFAULT_MODEL_ALIASES MODEL_ALIASES OFFICIAL_MODEL_NAMES",
    "fastlens.compat.tools_analysis.attribution_patching": """AttributionResult
        EdgeAttributionConfig GradientCache Granularity MetricFn Node NodeKind attribution_patch
        cache_activation_and_gradient enumerate_nodes""",
    "fastlens.compat.tools_analysis.direct_logit_attribution": """DirectLogitAttribution
        TokenInput Unit direct_logit_attribution""",
    "fastlens.compat.tools_analysis.projection_kernel": """AttentionHeadRef AttentionRole
        HeadAffinityPair HeadAffinityResult HeadKind LayerOrder ProjectionKernelResult
        RandomSubspaceReference SubspaceBasis attention_head_subspace_affinity
        orthonormal_subspace projection_kernel random_projection_kernel_moments""",
    "fastlens.compat.tools_analysis.svd_circuits": """DegenerateDirectionError
        HeadDecomposition HeadSVD RankReportRow Which decompose_head""",
    "fastlens.compat.utilities.activation_functions": """ActivationFunction SOFTCAP_DISABLED
        SUPPORTED_ACTIVATIONS XIELU apply_softcap gelu_fast gelu_new gelu_pytorch_tanh relu2
        softcap_enabled solu xielu""",
    "fastlens.compat.utilities.addmm": "batch_addmm vanilla_addmm",
    "fastlens.compat.utilities.attention": "clamp_qkv complex_attn_linear simple_attn_linear",
    "fastlens.compat.utilities.attribute_utils": "get_nested_attr set_nested_attr",
    "fastlens.compat.utilities.cache": "get_pos_offset",
    "fastlens.compat.utilities.components_utils": "get_act_name",
    "fastlens.compat.utilities.defaults_utils": """LocallyOverridenDefaults USE_DEFAULT_VALUE
        override_or_use_default_value""",
    "fastlens.compat.utilities.devices": """ModelWithCfg get_device move_to_and_update_config
        warn_if_mps""",
    "fastlens.compat.utilities.exploratory_utils": "test_prompt",
    "fastlens.compat.utilities.gpu_utils": "print_gpu_mem",
    "fastlens.compat.utilities.hf_utils": """CACHE_DIR call_hf_with_retry
        clear_huggingface_cache download_file_from_hf enable_hf_numeric_tower enable_hf_retry
        get_dataset get_hf_token get_rotary_pct_from_config keep_single_column
        select_compatible_kwargs""",
    "fastlens.compat.utilities.initialization_utils": """NonlinearityType
        calc_fan_in_and_fan_out init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_
        init_xavier_uniform_""",
    "fastlens.compat.utilities.library_utils": "is_library_available",
    "fastlens.compat.utilities.lm_utils": "lm_accuracy lm_cross_entropy_loss",
    "fastlens.compat.utilities.logits_utils": "logits_to_df sample_logits",
    "fastlens.compat.utilities.matrix": "composition_scores get_matrix_corner",
    "fastlens.compat.utilities.multi_gpu": """AvailableDeviceMemory MIXED_CPU_GPU_ERROR
        MaxMemory calculate_available_device_cuda_memory count_unique_devices
        determine_available_memory_for_available_devices find_embedding_device
        get_best_available_cuda_device get_best_available_device get_device_for_block_index
        is_mixed_cpu_gpu resolve_device_map sort_devices_based_on_available_memory""",
    "fastlens.compat.utilities.parameter_swap": "temporarily_swap_parameter",
    "fastlens.compat.utilities.quantization": """describe_quantization quantization_method
        require_readable_weight unreadable_weight_reason""",
    "fastlens.compat.utilities.slice": "Slice SliceInput",
    "fastlens.compat.utilities.tensors": """check_structure filter_dict_by_prefix get_corner
        get_cumsum_along_dim get_offset_position_ids is_lower_triangular is_square
        remove_batch_dim repeat_along_head_dimension to_numpy transpose""",
    "fastlens.compat.utilities.tokenize_utils": """get_attention_mask
        get_input_with_manually_prepended_bos get_tokenizer_with_bos get_tokens_with_bos_removed
        tokenize_and_concatenate""",
    "fastlens.compat.utilities.typed_module_list": "TypedModuleList",
    "fastlens.compat.weight_conversions": """
        convert_apertus_weights convert_bert_weights convert_bloom_weights convert_coder_weights
        convert_gemma_weights convert_gpt2_weights convert_gpt_oss_weights convert_gptj_weights
        convert_llama_weights convert_mingpt_weights convert_mistral_weights
        convert_mixtral_weights convert_nanogpt_weights convert_neel_solu_old_weights
        convert_neo_weights convert_neox_weights convert_olmo_weights convert_olmo2_weights
        convert_olmo3_weights convert_olmoe_weights convert_opt_weights convert_phi_weights
        convert_phi3_weights convert_qwen_weights convert_qwen2_weights convert_qwen3_weights
        convert_t5_weights
        """,
    "fastlens.components.attention": "AbstractAttention Attention GroupedQueryAttention",
    "fastlens.components.bert_block": "BertBlock",
    "fastlens.components.bert_embed": "BertEmbed",
    "fastlens.components.bert_mlm_head": "BertMLMHead",
    "fastlens.components.bert_nsp_head": "BertNSPHead",
    "fastlens.components.bert_pooler": "BertPooler",
    "fastlens.components.block": "TransformerBlock",
    "fastlens.components.embed": "Embed PosEmbed Unembed",
    "fastlens.components.kv_cache": """TransformerLensKeyValueCache
        TransformerLensKeyValueCacheEntry""",
    "fastlens.components.mlp": "CanBeUsedAsMLP GatedMLP MLP",
    "fastlens.components.moe": "MoE MoEGatedMLP",
    "fastlens.components.norms": "LayerNorm LayerNormPre RMSNorm RMSNormPre",
    "fastlens.components.t5_attention": "T5Attention",
    "fastlens.components.t5_block": "T5Block",
    "fastlens.components.token_typed_embed": "TokenTypeEmbed",
    "fastlens.config": "HookedTransformerConfig TransformerLensConfig=HookedTransformerConfig",
    "fastlens.evals": """DATASET_LOADERS DATASET_NAMES IOIDataset MMLU_ANSWER_LETTERS
        MMLU_SUBJECTS evaluate evaluate_on_dataset induction_loss ioi_eval make_code_data_loader
        make_mmlu_data_loader make_owt_data_loader make_pile_data_loader make_wiki_data_loader
        mmlu_eval sanity_check""",
    "fastlens.factored_matrix": "FactoredMatrix",
    "fastlens.hooks.point": "HookFunction HookPoint LensHandle",
    "fastlens.hooks.root": "HookIntrospectionMixin=HookedRootModule HookedRootModule NamesFilter",
    "fastlens.model.bert_next_sentence_prediction": "BertNextSentencePrediction",
    "fastlens.model.hooked_encoder": "HookedEncoder",
    "fastlens.model.hooked_encoder_decoder": "HookedEncoderDecoder",
    "fastlens.model.hooked_transformer": "HookedTransformer Output",
    "fastlens.model.open_model": "DTYPE_FROM_STRING=DTYPES",
    "fastlens.patching": """AxisNames CorruptedActivation Logits PatchedActivation
        generic_activation_patch get_act_patch_attn_head_all_pos_every
        get_act_patch_attn_head_by_pos_every get_act_patch_attn_head_k_all_pos
        get_act_patch_attn_head_k_by_pos get_act_patch_attn_head_out_all_pos
        get_act_patch_attn_head_out_by_pos get_act_patch_attn_head_pattern_all_pos
        get_act_patch_attn_head_pattern_by_pos get_act_patch_attn_head_pattern_dest_src_pos
        get_act_patch_attn_head_q_all_pos get_act_patch_attn_head_q_by_pos
        get_act_patch_attn_head_v_all_pos get_act_patch_attn_head_v_by_pos get_act_patch_attn_out
        get_act_patch_block_every get_act_patch_mlp_out get_act_patch_resid_mid
        get_act_patch_resid_pre layer_head_dest_src_pos_pattern_patch_setter
        layer_head_pattern_patch_setter layer_head_pos_pattern_patch_setter
        layer_head_vector_patch_setter layer_pos_head_vector_patch_setter layer_pos_patch_setter
        make_df_from_ranges""",
    "fastlens.train": "HookedTransformerTrainConfig train",
    "fastlens.weights.load": "fill_missing_keys",
    "fastlens.weights.process_weights": "ProcessWeights",
}

# Module of TransformerLens, below the package -> what can be imported from it.
MODULES: dict[str, str] = {
    "": """ActivationCache BertNextSentencePrediction EasyTransformer=HookedTransformer
        EasyTransformerConfig=HookedTransformerConfig
        EasyTransformerKeyValueCache=TransformerLensKeyValueCache
        EasyTransformerKeyValueCacheEntry=TransformerLensKeyValueCacheEntry FactoredMatrix
        HookedEncoder HookedEncoderDecoder HookedRootModule HookedTransformer
        HookedTransformerConfig HookedTransformerKeyValueCache=TransformerLensKeyValueCache
        HookedTransformerKeyValueCacheEntry=TransformerLensKeyValueCacheEntry SVDInterpreter
        TransformerLensKeyValueCache TransformerLensKeyValueCacheEntry""",
    "ActivationCache": "ActivationCache Slice SliceInput warn_if_mps",
    "BertNextSentencePrediction": "ActivationCache BertNextSentencePrediction",
    "FactoredMatrix": "FactoredMatrix TensorLike",
    "HookedEncoder": """ActivationCache BertBlock BertEmbed BertMLMHead BertNSPHead BertPooler
        FactoredMatrix GatedMLP HookPoint HookedEncoder HookedRootModule HookedTransformerConfig
        MLP TypedModuleList Unembed""",
    "HookedEncoderDecoder": """ActivationCache Embed FactoredMatrix GatedMLP HookPoint
        HookedEncoderDecoder HookedRootModule HookedTransformerConfig MLP RMSNorm T5Block
        TypedModuleList Unembed get_device_for_block_index sample_logits warn_if_mps""",
    "HookedRootModule": """DeviceType HookFunction HookIntrospectionMixin HookPoint
        HookedRootModule NamesFilter Slice SliceInput warn_if_mps""",
    "HookedTransformer": """ActivationCache DTYPE_FROM_STRING Embed FactoredMatrix GatedMLP
        HookPoint HookedRootModule HookedTransformer HookedTransformerConfig LayerNorm
        LayerNormPre Loss LossPerToken MLP NON_HF_HOSTED_MODEL_NAMES Output PosEmbed
        ProcessWeights RMSNorm RMSNormPre SingleLoss TransformerBlock TransformerLensKeyValueCache
        TypedModuleList USE_DEFAULT_VALUE Unembed apply_softcap get_best_available_device
        get_device_for_block_index init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_
        init_xavier_uniform_ move_to_and_update_config softcap_enabled""",
    "HookedTransformerConfig": "HookedTransformerConfig",
    "SVDInterpreter": "FactoredMatrix OUTPUT_EMBEDDING SVDInterpreter VECTOR_TYPES",
    "cache": "",
    "cache.key_value_cache": """TransformerLensConfig TransformerLensKeyValueCache
        TransformerLensKeyValueCacheEntry get_device_for_block_index""",
    "cache.key_value_cache_entry": "TransformerLensConfig TransformerLensKeyValueCacheEntry",
    "components": """AbstractAttention Attention BertBlock BertEmbed BertMLMHead BertNSPHead
        BertPooler Embed GatedMLP GroupedQueryAttention LayerNorm LayerNormPre MLP MoE PosEmbed
        RMSNorm RMSNormPre T5Attention T5Block TokenTypeEmbed TransformerBlock Unembed""",
    "components.abstract_attention": """AbstractAttention FactoredMatrix HookPoint
        HookedTransformerConfig RMSNorm TransformerLensKeyValueCacheEntry apply_softcap
        complex_attn_linear get_offset_position_ids simple_attn_linear""",
    "components.attention": "AbstractAttention Attention HookedTransformerConfig",
    "components.bert_block": """Attention BertBlock HookPoint HookedTransformerConfig LayerNorm
        MLPFactory repeat_along_head_dimension""",
    "components.bert_embed": """BertEmbed Embed HookPoint HookedTransformerConfig LayerNorm
        PosEmbed TokenTypeEmbed""",
    "components.bert_mlm_head": "BertMLMHead HookedTransformerConfig LayerNorm",
    "components.bert_nsp_head": "BertNSPHead HookPoint HookedTransformerConfig",
    "components.bert_pooler": "BertPooler HookPoint HookedTransformerConfig",
    "components.embed": "Embed HookedTransformerConfig LayerNorm",
    "components.grouped_query_attention": """AbstractAttention GroupedQueryAttention
        HookedTransformerConfig RMSNorm complex_attn_linear simple_attn_linear""",
    "components.layer_norm": "HookPoint HookedTransformerConfig LayerNorm",
    "components.layer_norm_pre": "HookPoint HookedTransformerConfig LayerNormPre",
    "components.mlps": "",
    "components.mlps.can_be_used_as_mlp": """ActivationFunction ActivationFunctionFactory
        CanBeUsedAsMLP HookPoint HookedTransformerConfig LayerNorm LayerNormPre""",
    "components.mlps.gated_mlp": "CanBeUsedAsMLP GatedMLP HookPoint HookedTransformerConfig",
    "components.mlps.moe": """ActivationFunctionFactory CanBeUsedAsMLP HookPoint
        HookedTransformerConfig MoE MoEGatedMLP""",
    "components.mlps.mlp": "CanBeUsedAsMLP HookPoint HookedTransformerConfig MLP batch_addmm",
    "components.pos_embed": "HookedTransformerConfig PosEmbed get_offset_position_ids",
    "components.rms_norm": "HookPoint HookedTransformerConfig RMSNorm RMSNormInput",
    "components.rms_norm_pre": "HookPoint HookedTransformerConfig RMSNormPre",
    "components.t5_attention": "AbstractAttention HookPoint HookedTransformerConfig T5Attention",
    "components.t5_block": """HookPoint HookedTransformerConfig MLPFactory RMSNorm T5Attention
        T5Block TransformerLensKeyValueCacheEntry repeat_along_head_dimension""",
    "components.token_typed_embed": "HookedTransformerConfig TokenTypeEmbed",
    "components.transformer_block": """Attention CanBeUsedAsMLP GroupedQueryAttention HookPoint
        HookedTransformerConfig LayerNorm LayerNormPre MLPFactory RMSNorm RMSNormPre
        TransformerBlock TransformerLensKeyValueCacheEntry repeat_along_head_dimension""",
    "components.unembed": "HookPoint HookedTransformerConfig Unembed",
    "config": "HookedTransformerConfig TransformerLensConfig",
    "config.hooked_transformer_config": """HookedTransformerConfig SOFTCAP_DISABLED
        SUPPORTED_ACTIVATIONS TransformerLensConfig get_device""",
    "config.transformer_lens_config": "TransformerLensConfig",
    "evals": """DATASET_LOADERS DATASET_NAMES IOIDataset MMLU_ANSWER_LETTERS MMLU_SUBJECTS
        evaluate evaluate_on_dataset induction_loss ioi_eval make_code_data_loader
        make_mmlu_data_loader make_owt_data_loader make_pile_data_loader make_wiki_data_loader
        mmlu_eval sanity_check warn_if_mps""",
    "factories": "",
    "factories.activation_function_factory": """ActivationFunction ActivationFunctionFactory
        HookedTransformerConfig SUPPORTED_ACTIVATIONS XIELU""",
    "factories.mlp_factory": """CanBeUsedAsMLP GatedMLP HookedTransformerConfig MLP MLPFactory
        MoE""",
    "head_detector": """ActivationCache CACHE_WITH_SEQ_LIST_ERR DET_PAT_NOT_SQUARE_ERR
        ErrorMeasure HEAD_NAMES HeadName HookedTransformer INVALID_HEAD_NAME_ERR LayerHeadTuple
        LayerToHead SEQ_LEN_ERR compute_head_attention_similarity_score detect_head
        get_duplicate_token_head_detection_pattern get_induction_head_detection_pattern
        get_previous_token_head_detection_pattern get_supported_heads is_lower_triangular
        is_square""",
    "hook_points": """DeviceType HookFunction HookIntrospectionMixin HookPoint HookedRootModule
        LensHandle NamesFilter""",
    "loading_from_pretrained": """
        Config HookedTransformerConfig MODEL_ALIASES NEED_REMOTE_CODE_MODELS
        NON_HF_HOSTED_MODEL_NAMES OFFICIAL_MODEL_NAMES PYTHIA_CHECKPOINTS PYTHIA_V0_CHECKPOINTS
        STANFORD_CRFM_CHECKPOINTS convert_apertus_weights convert_bert_weights convert_bloom_weights
        convert_coder_weights convert_gemma_weights convert_gpt2_weights convert_gpt_oss_weights
        convert_gptj_weights convert_hf_model_config convert_llama_weights convert_mingpt_weights
        convert_mistral_weights convert_mixtral_weights convert_nanogpt_weights
        convert_neel_model_config convert_neel_solu_old_weights convert_neo_weights
        convert_neox_weights convert_olmo2_weights convert_olmo3_weights convert_olmo_weights
        convert_olmoe_weights convert_opt_weights convert_phi3_weights convert_phi_weights
        convert_qwen2_weights convert_qwen3_weights convert_qwen_weights convert_t5_weights
        fill_missing_keys get_basic_config get_checkpoint_labels get_num_params_of_pretrained
        get_official_model_name get_pretrained_model_config get_pretrained_state_dict
        get_rotary_pct_from_config make_model_alias_map quantization_method unreadable_weight_reason
        """,
    "past_key_value_caching": """HookedTransformerKeyValueCache=TransformerLensKeyValueCache
        HookedTransformerKeyValueCacheEntry=TransformerLensKeyValueCacheEntry""",
    "patching": """ActivationCache AxisNames CorruptedActivation HookedTransformer Logits
        PatchedActivation generic_activation_patch get_act_patch_attn_head_all_pos_every
        get_act_patch_attn_head_by_pos_every get_act_patch_attn_head_k_all_pos
        get_act_patch_attn_head_k_by_pos get_act_patch_attn_head_out_all_pos
        get_act_patch_attn_head_out_by_pos get_act_patch_attn_head_pattern_all_pos
        get_act_patch_attn_head_pattern_by_pos get_act_patch_attn_head_pattern_dest_src_pos
        get_act_patch_attn_head_q_all_pos get_act_patch_attn_head_q_by_pos
        get_act_patch_attn_head_v_all_pos get_act_patch_attn_head_v_by_pos get_act_patch_attn_out
        get_act_patch_block_every get_act_patch_mlp_out get_act_patch_resid_mid
        get_act_patch_resid_pre layer_head_dest_src_pos_pattern_patch_setter
        layer_head_pattern_patch_setter layer_head_pos_pattern_patch_setter
        layer_head_vector_patch_setter layer_pos_head_vector_patch_setter layer_pos_patch_setter
        make_df_from_ranges""",
    "pretrained": "",
    "pretrained.weight_conversions": """
        convert_apertus_weights convert_bert_weights convert_bloom_weights convert_coder_weights
        convert_gemma_weights convert_gpt2_weights convert_gpt_oss_weights convert_gptj_weights
        convert_llama_weights convert_mingpt_weights convert_mistral_weights
        convert_mixtral_weights convert_nanogpt_weights convert_neel_solu_old_weights
        convert_neo_weights convert_neox_weights convert_olmo_weights convert_olmo2_weights
        convert_olmo3_weights convert_olmoe_weights convert_opt_weights convert_phi_weights
        convert_phi3_weights convert_qwen_weights convert_qwen2_weights convert_qwen3_weights
        convert_t5_weights
        """,
    "pretrained.weight_conversions.apertus": "HookedTransformerConfig convert_apertus_weights",
    "pretrained.weight_conversions.bert": "HookedTransformerConfig convert_bert_weights",
    "pretrained.weight_conversions.bloom": "HookedTransformerConfig convert_bloom_weights",
    "pretrained.weight_conversions.coder": "HookedTransformerConfig convert_coder_weights",
    "pretrained.weight_conversions.gemma": "HookedTransformerConfig convert_gemma_weights",
    "pretrained.weight_conversions.gpt2": "HookedTransformerConfig convert_gpt2_weights",
    "pretrained.weight_conversions.openai": """HookedTransformerConfig convert_gpt_oss_weights
        require_readable_weight""",
    "pretrained.weight_conversions.gptj": "HookedTransformerConfig convert_gptj_weights",
    "pretrained.weight_conversions.llama": "HookedTransformerConfig convert_llama_weights",
    "pretrained.weight_conversions.mingpt": "HookedTransformerConfig convert_mingpt_weights",
    "pretrained.weight_conversions.mistral": "HookedTransformerConfig convert_mistral_weights",
    "pretrained.weight_conversions.mixtral": """HookedTransformerConfig convert_mixtral_weights
        require_readable_weight""",
    "pretrained.weight_conversions.nanogpt": "HookedTransformerConfig convert_nanogpt_weights",
    "pretrained.weight_conversions.neel_solu_old": """HookedTransformerConfig
        convert_neel_solu_old_weights""",
    "pretrained.weight_conversions.neo": "HookedTransformerConfig convert_neo_weights",
    "pretrained.weight_conversions.neox": "HookedTransformerConfig convert_neox_weights",
    "pretrained.weight_conversions.olmo": "HookedTransformerConfig convert_olmo_weights",
    "pretrained.weight_conversions.olmo2": "HookedTransformerConfig convert_olmo2_weights",
    "pretrained.weight_conversions.olmo3": "HookedTransformerConfig convert_olmo3_weights",
    "pretrained.weight_conversions.olmoe": """HookedTransformerConfig convert_olmoe_weights
        require_readable_weight""",
    "pretrained.weight_conversions.opt": "HookedTransformerConfig convert_opt_weights",
    "pretrained.weight_conversions.phi": "HookedTransformerConfig convert_phi_weights",
    "pretrained.weight_conversions.phi3": "HookedTransformerConfig convert_phi3_weights",
    "pretrained.weight_conversions.qwen": "HookedTransformerConfig convert_qwen_weights",
    "pretrained.weight_conversions.qwen2": "HookedTransformerConfig convert_qwen2_weights",
    "pretrained.weight_conversions.qwen3": "HookedTransformerConfig convert_qwen3_weights",
    "pretrained.weight_conversions.t5": "HookedTransformerConfig convert_t5_weights",
    "supported_models": "DEFAULT_MODEL_ALIASES MODEL_ALIASES OFFICIAL_MODEL_NAMES",
    "tools": "",
    "tools.analysis": """AttentionHeadRef AttributionResult DirectLogitAttribution
        EdgeAttributionConfig HeadAffinityPair HeadAffinityResult Node ProjectionKernelResult
        RandomSubspaceReference SubspaceBasis attention_head_subspace_affinity attribution_patch
        direct_logit_attribution get_act_patch_direct_path get_act_patch_direct_path_all_sources
        orthonormal_subspace projection_kernel random_projection_kernel_moments""",
    "tools.analysis.attribution_patching": """AttributionResult EdgeAttributionConfig
        GradientCache Granularity MetricFn NamesFilter Node NodeKind attribution_patch
        cache_activation_and_gradient enumerate_nodes""",
    "tools.analysis.direct_logit_attribution": """ActivationCache DirectLogitAttribution
        SliceInput TokenInput Unit direct_logit_attribution""",
    "tools.analysis.direct_path_patching": """ActivationCache HookedTransformer
        get_act_patch_direct_path get_act_patch_direct_path_all_sources""",
    "tools.analysis.projection_kernel": """AttentionHeadRef AttentionRole HeadAffinityPair
        HeadAffinityResult HeadKind LayerOrder ProjectionKernelResult RandomSubspaceReference
        SubspaceBasis attention_head_subspace_affinity orthonormal_subspace projection_kernel
        random_projection_kernel_moments""",
    "tools.analysis.svd_circuits": """DegenerateDirectionError FactoredMatrix HeadDecomposition
        HeadSVD RankReportRow Which decompose_head""",
    "train": "HookedTransformer HookedTransformerTrainConfig is_library_available train",
    "utilities": """ActivationFunction LocallyOverridenDefaults ModelWithCfg NonlinearityType
        SOFTCAP_DISABLED SUPPORTED_ACTIVATIONS Slice SliceInput TypedModuleList USE_DEFAULT_VALUE
        apply_softcap calc_fan_in_and_fan_out calculate_available_device_cuda_memory
        check_structure clear_huggingface_cache composition_scores count_unique_devices
        determine_available_memory_for_available_devices download_file_from_hf
        filter_dict_by_prefix find_embedding_device gelu_fast gelu_new get_act_name
        get_attention_mask get_best_available_cuda_device get_best_available_device get_corner
        get_cumsum_along_dim get_dataset get_device get_device_for_block_index
        get_input_with_manually_prepended_bos get_matrix_corner get_nested_attr
        get_offset_position_ids get_rotary_pct_from_config get_tokenizer_with_bos
        get_tokens_with_bos_removed init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_
        init_xavier_uniform_ is_library_available is_lower_triangular is_square keep_single_column
        lm_accuracy lm_cross_entropy_loss logits_to_df move_to_and_update_config
        override_or_use_default_value print_gpu_mem remove_batch_dim repeat_along_head_dimension
        resolve_device_map sample_logits select_compatible_kwargs set_nested_attr softcap_enabled
        solu sort_devices_based_on_available_memory temporarily_swap_parameter test_prompt
        to_numpy tokenize_and_concatenate transpose warn_if_mps""",
    "utilities.activation_functions": """ActivationFunction SOFTCAP_DISABLED
        SUPPORTED_ACTIVATIONS XIELU apply_softcap gelu_fast gelu_new gelu_pytorch_tanh relu2
        softcap_enabled solu xielu""",
    "utilities.addmm": "batch_addmm vanilla_addmm",
    "utilities.attention": "clamp_qkv complex_attn_linear simple_attn_linear",
    "utilities.attribute_utils": "get_nested_attr set_nested_attr",
    "utilities.cache": "TransformerLensKeyValueCache get_pos_offset",
    "utilities.components_utils": "get_act_name",
    "utilities.defaults_utils": """LocallyOverridenDefaults USE_DEFAULT_VALUE get_nested_attr
        override_or_use_default_value set_nested_attr""",
    "utilities.devices": """AvailableDeviceMemory ModelWithCfg
        calculate_available_device_cuda_memory determine_available_memory_for_available_devices
        get_best_available_cuda_device get_best_available_device get_device
        get_device_for_block_index move_to_and_update_config
        sort_devices_based_on_available_memory warn_if_mps""",
    "utilities.exploratory_utils": "test_prompt",
    "utilities.gpu_utils": "print_gpu_mem",
    "utilities.hf_utils": """CACHE_DIR call_hf_with_retry clear_huggingface_cache
        download_file_from_hf enable_hf_numeric_tower enable_hf_retry get_dataset get_hf_token
        get_rotary_pct_from_config keep_single_column select_compatible_kwargs""",
    "utilities.initialization_utils": """NonlinearityType calc_fan_in_and_fan_out
        init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_ init_xavier_uniform_""",
    "utilities.library_utils": "is_library_available",
    "utilities.lm_utils": "lm_accuracy lm_cross_entropy_loss",
    "utilities.logits_utils": "logits_to_df sample_logits",
    "utilities.matrix": "FactoredMatrix composition_scores get_corner get_matrix_corner",
    "utilities.multi_gpu": """AvailableDeviceMemory MIXED_CPU_GPU_ERROR MaxMemory
        calculate_available_device_cuda_memory count_unique_devices
        determine_available_memory_for_available_devices find_embedding_device
        get_best_available_cuda_device get_best_available_device get_device_for_block_index
        is_mixed_cpu_gpu resolve_device_map sort_devices_based_on_available_memory""",
    "utilities.parameter_swap": "temporarily_swap_parameter",
    "utilities.quantization": """describe_quantization quantization_method
        require_readable_weight unreadable_weight_reason""",
    "utilities.slice": "Slice SliceInput to_numpy",
    "utilities.tensors": """check_structure filter_dict_by_prefix get_corner
        get_cumsum_along_dim get_offset_position_ids is_lower_triangular is_square
        remove_batch_dim repeat_along_head_dimension to_numpy transpose""",
    "utilities.tokenize_utils": """get_attention_mask get_cumsum_along_dim
        get_input_with_manually_prepended_bos get_tokenizer_with_bos get_tokens_with_bos_removed
        keep_single_column tokenize_and_concatenate""",
    "utilities.typed_module_list": "TypedModuleList",
    "utils": """ActivationFunction LocallyOverridenDefaults ModelWithCfg NonlinearityType
        SOFTCAP_DISABLED SUPPORTED_ACTIVATIONS Slice SliceInput TypedModuleList USE_DEFAULT_VALUE
        apply_softcap calc_fan_in_and_fan_out calculate_available_device_cuda_memory
        check_structure clear_huggingface_cache composition_scores count_unique_devices
        determine_available_memory_for_available_devices download_file_from_hf
        filter_dict_by_prefix find_embedding_device gelu_fast gelu_new get_act_name
        get_attention_mask get_best_available_cuda_device get_best_available_device get_corner
        get_cumsum_along_dim get_dataset get_device get_device_for_block_index
        get_input_with_manually_prepended_bos get_matrix_corner get_nested_attr
        get_offset_position_ids get_rotary_pct_from_config get_tokenizer_with_bos
        get_tokens_with_bos_removed init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_
        init_xavier_uniform_ is_library_available is_lower_triangular is_square keep_single_column
        lm_accuracy lm_cross_entropy_loss logits_to_df move_to_and_update_config
        override_or_use_default_value print_gpu_mem remove_batch_dim repeat_along_head_dimension
        resolve_device_map sample_logits select_compatible_kwargs set_nested_attr softcap_enabled
        solu sort_devices_based_on_available_memory temporarily_swap_parameter test_prompt
        to_numpy tokenize_and_concatenate transpose warn_if_mps""",
    "weight_processing": """FactoredMatrix ProcessWeights TransformerLensConfig
        filter_dict_by_prefix""",
}

# The same name for something else, in one module.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("tools.analysis.attribution_patching", "NamesFilter"): (
        "fastlens.compat.tools_analysis.attribution_patching"
    ),
}


@functools.cache
def homes() -> dict[str, tuple[str, str]]:
    """Name -> (module of fastlens, name there)."""
    found = {}
    for module, names in HOMES.items():
        for entry in names.split():
            theirs, _, ours = entry.partition("=")
            found[theirs] = (module, ours or theirs)
    return found


@functools.cache
def names_of(path: str) -> dict[str, tuple[str, str]]:
    """What can be imported from one of TransformerLens' modules: name -> (module, name) of ours.

    ``path`` is the module's, below the package; the package itself is "".
    """
    found = {}
    for entry in MODULES.get(path, "").split():
        theirs, _, ours = entry.partition("=")
        module, name = homes()[ours or theirs]
        found[theirs] = (EXCEPTIONS.get((path, theirs), module), name)
    return found
