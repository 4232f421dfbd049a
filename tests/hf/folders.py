"""Tiny folders as Hugging Face writes them, from nothing of ours: names, shapes and config.json spelled out by hand."""

import json

import ml_dtypes
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

V, D, F, H, K, LAYERS = 400, 16, 24, 4, 2, 2
COMMON = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": K, "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.02, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1, "use_cache": True,
    "attention_dropout": 0.0, "transformers_version": "5.23.0", "dtype": "float32",
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 4, "attention_bias": False,
              "mlp_bias": False, "pretraining_tp": 1, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "mistral": {**COMMON, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 6, "sliding_window": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen2": {**COMMON, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "sliding_window": None,
              "use_sliding_window": False, "max_window_layers": 28, "layer_types": ["full_attention"] * LAYERS,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {**COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "attention_bias": False,
              "sliding_window": None, "use_sliding_window": False, "max_window_layers": 28, "layer_types": ["full_attention"] * LAYERS,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def shapes_of(config, causal=True):
    """The tensors of a model by name, [out, in] as torch keeps them."""
    c = config.get("head_dim") or D // H
    prefix, biases = "model." if causal else "", {"qwen2": "qkv"}.get(config["model_type"], "qkvo" if config.get("attention_bias") else "")
    shapes = {f"{prefix}embed_tokens.weight": (V, D), f"{prefix}norm.weight": (D,)}
    for i in range(LAYERS):
        layer = f"{prefix}layers.{i}."
        shapes |= {f"{layer}input_layernorm.weight": (D,), f"{layer}post_attention_layernorm.weight": (D,),
                   f"{layer}self_attn.q_proj.weight": (H * c, D), f"{layer}self_attn.k_proj.weight": (K * c, D),
                   f"{layer}self_attn.v_proj.weight": (K * c, D), f"{layer}self_attn.o_proj.weight": (D, H * c),
                   f"{layer}mlp.gate_proj.weight": (F, D), f"{layer}mlp.up_proj.weight": (F, D), f"{layer}mlp.down_proj.weight": (D, F)}
        shapes |= {f"{layer}self_attn.{n}_proj.bias": shapes[f"{layer}self_attn.{n}_proj.weight"][:1] for n in biases}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.q_norm.weight": (c,), f"{layer}self_attn.k_norm.weight": (c,)}
    return shapes | ({} if config["tie_word_embeddings"] or not causal else {"lm_head.weight": (V, D)})


def random_tensors(config, dtype=np.float32, causal=True, seed=0):
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) * 0.3 + ("norm" in name)).astype(dtype) for name, shape in shapes_of(config, causal).items()}


def tokenizer(size=300):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(["the reader reads a file and the cat sits"] * 9, trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "</s>"], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return made


TOKENIZER = tokenizer().to_str()


def framed(single, special=("<pad>", "</s>")):
    """The tokenizer.json whose post-processor makes `single`, such as "<pad> $A </s>"."""
    made = tokenizers.Tokenizer.from_str(TOKENIZER)
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(t, made.token_to_id(t)) for t in special])
    return made.to_str()


def sentence_files(folder, pooling=None, modules=("Transformer", "Pooling", "Normalize"), transformer=None, config=None):
    """What sentence-transformers adds to a folder: `pooling`, `transformer` and `config` are the contents of its three files."""
    paths = ["" if kind == "Transformer" else f"{i}_{kind}" for i, kind in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(modules, paths))]))
    for path in filter(None, paths):
        (folder / path).mkdir(exist_ok=True)
    if "Pooling" in modules:
        (folder / paths[modules.index("Pooling")] / "config.json").write_text(json.dumps({"word_embedding_dimension": D, **(pooling or {})}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config or {}))
    return folder


def write(folder, family="llama", dtype="float32", causal=True, shards=1, seed=0, **changes):
    """A folder, and its tensors."""
    config = {**CONFIGS[family], "dtype": dtype, **changes}
    tensors = random_tensors(config, {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype], causal, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder, tensors
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder, tensors
