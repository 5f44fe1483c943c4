"""A tiny random Llama with its own tokenizer and chat template, built in a second, for tests of every
package."""

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% "
    "endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = (
    "the quick brown fox jumps over the lazy dog",
    "what is the colour of the sky? the sky is blue.",
    "add two and three: the sum of two and three is five",
    "name a town by the sea and a river that runs through it",
)


def tiny_llama(*, seed: int = 0, tied: bool = True, hidden: int = 32, layers: int = 2, vocab: int = 300):
    """A LlamaForCausalLM in float32 with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=vocab,
                max_position_embeddings=256,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
            )
        )
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.3)  # far from zero, so that logits differ visibly
    return model


def tiny_tokenizer():
    """A byte-level BPE of 300 tokens with the special tokens of CHAT_TEMPLATE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_TEXT * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_base(directory: Path, **options) -> Path:
    """`directory` as a base model: safetensors, config, tokenizer, chat template."""
    tiny_llama(**options).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
