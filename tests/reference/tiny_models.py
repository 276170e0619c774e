"""Writes tests/fixtures/tiny-*: small random models in HF layout and the logits transformers computes for them."""

from common import FIXTURES, load_base, logits_of, normal, rng, save_json, save_tensors

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

COMMON = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
SMALL = dict(COMMON, vocab_size=160, num_hidden_layers=2, max_position_embeddings=256)
THETA = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    # Scaled so that all three regimes occur among the eight frequencies of a head.
    "rope_type": "llama3",
    "rope_theta": 100000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# name -> (configuration, size of a shard, a change to the model that must show in the logits)
MODELS = {
    "tiny-llama": (
        LlamaConfig(
            **COMMON, vocab_size=320, num_hidden_layers=3, max_position_embeddings=512, rms_norm_eps=1e-5,
            rope_parameters=THETA, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        ),
        "1GB",
        {"rope_parameters": dict(THETA, rope_theta=100000.0)},
    ),
    "tiny-llama-tied": (
        LlamaConfig(**SMALL, rms_norm_eps=1e-5, rope_parameters=LLAMA3, tie_word_embeddings=True),
        "100KB",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    ),
    "tiny-mistral": (
        MistralConfig(**SMALL, rms_norm_eps=1e-5, rope_parameters=THETA, sliding_window=8),
        "1GB",
        {"sliding_window": None},
    ),
    "tiny-qwen2": (
        Qwen2Config(**SMALL, rms_norm_eps=1e-6, rope_parameters=THETA, tie_word_embeddings=True),
        "1GB",
        "bias",
    ),
    "tiny-qwen3": (
        Qwen3Config(**SMALL, head_dim=32, rms_norm_eps=1e-6, rope_parameters=THETA, tie_word_embeddings=True),
        "1GB",
        "_norm.weight",
    ),
}

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Atelier serves a small model and learns a style from every conversation.",
    "You are a helpful assistant. Answer the question in one short sentence.",
    "What is the capital of France? The capital of France is Paris.",
    "She said that the letter was written before the meeting, and that nobody had read it.",
    "Please write a short note to the team: the release is on Monday at 10:30.",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def randomise(model, generator):
    """Weights that keep activations near one, with attention and logits far from uniform."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():  # tied weights appear once, as the embedding
        if name.endswith("norm.weight"):
            value = normal(generator, parameter.shape, mean=1.0, std=0.2)
        elif name.endswith("bias"):
            value = normal(generator, parameter.shape, std=0.4)
        elif name.endswith("embed_tokens.weight"):
            value = normal(generator, parameter.shape, std=0.18 if tied else 1.0)
        else:
            gain = 1.3 if "lm_head" in name else 1.2 if "q_proj" in name or "k_proj" in name else 1.0
            value = normal(generator, parameter.shape, std=gain / parameter.shape[1] ** 0.5)
        parameter.data.copy_(value)


def write_tokenizer(folder):
    """A byte-level BPE of 320 entries, and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    assert tokenizer.get_vocab_size() == 320
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        str(i): dict(content=t, lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)
        for i, t in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    save_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": special,
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "chat_template": CHATML,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": 512,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|endoftext|>",
        },
    )


for number, (name, (config, shard, change)) in enumerate(MODELS.items()):
    folder = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # adapters and training references below it belong to other scripts
        if old.is_file():
            old.unlink()

    generator = rng(1, number)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, generator)
    model.save_pretrained(folder, max_shard_size=shard)
    if name == "tiny-llama":
        write_tokenizer(folder)

    # The logits come from the files just written.
    input_ids = torch.from_numpy(generator.integers(0, config.vocab_size, (2, 24)))
    logits = logits_of(load_base(folder), input_ids)
    save_tensors(folder / "logits.safetensors", {"input_ids": input_ids, "logits": logits})

    # What makes this model different from the others must matter.
    if isinstance(change, dict):
        changed = load_base(folder, **change)
    else:
        changed = load_base(folder)
        for parameter_name, parameter in changed.named_parameters():
            if parameter_name.endswith(change):
                parameter.data.fill_(0.0 if change == "bias" else 1.0)
    effect = (logits_of(changed, input_ids) - logits).abs().max().item()
    spread = logits.std(dim=-1).mean().item()
    assert torch.isfinite(logits).all() and 1.0 < spread < 8 and effect > 0.3, (name, spread, effect)
    print(f"{name}: logits spread {spread:.2f}, range {logits.min():.1f}..{logits.max():.1f}, "
          f"without its speciality they move by {effect:.1f}")
