"""Tiny random bases of each architecture, and what the tests do with all of them."""

import torch

from peft_service.tuners.mtl_lora import TaskLoRAWrapper

WIDTH = 32
LAYERS = 2
VOCABULARY = 100
KINDS = ("bert", "llama", "t5", "bart", "gpt2")


def base(kind: str, seed: int = 0, **options):
    """A model in float32 and evaluation mode, with weights far from zero."""
    import transformers as hf

    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "bert":
            model = hf.BertForSequenceClassification(
                hf.BertConfig(
                    hidden_size=WIDTH,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=4,
                    intermediate_size=64,
                    max_position_embeddings=64,
                    num_labels=3,
                    **common | options,
                )
            )
        elif kind == "llama":
            model = hf.LlamaForCausalLM(
                hf.LlamaConfig(
                    hidden_size=WIDTH,
                    intermediate_size=64,
                    num_hidden_layers=LAYERS,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    **common | options,
                )
            )
        elif kind == "gpt2":
            model = hf.GPT2LMHeadModel(
                hf.GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=64, **common | options)
            )
        elif kind == "t5":
            model = hf.T5ForConditionalGeneration(
                hf.T5Config(
                    d_model=WIDTH,
                    d_kv=8,
                    d_ff=64,
                    num_layers=LAYERS,
                    num_heads=4,
                    decoder_start_token_id=0,
                    **common | options,
                )
            )
        else:
            model = hf.BartForConditionalGeneration(
                hf.BartConfig(
                    d_model=WIDTH,
                    encoder_layers=LAYERS,
                    decoder_layers=LAYERS,
                    encoder_attention_heads=4,
                    decoder_attention_heads=4,
                    encoder_ffn_dim=64,
                    decoder_ffn_dim=64,
                    max_position_embeddings=64,
                    decoder_start_token_id=2,
                    forced_eos_token_id=None,
                    **common | options,
                )
            )
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.data.normal_(std=0.2)
            elif parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(kind: str, seed: int = 1, rows: int = 3, length: int = 7):
    """Token ids ≥ 5, so without special tokens, and for encoder-decoders the decoder's."""
    generator = torch.Generator().manual_seed(seed)
    made = {"input_ids": torch.randint(5, VOCABULARY, (rows, length), generator=generator)}
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    if kind in ("t5", "bart"):
        made["decoder_input_ids"] = torch.randint(5, VOCABULARY, (rows, 5), generator=generator)
    return made


def ready(model, rows: int = 3):
    """Tell a multi-task adapter the tasks of the batch, 0 and 1 by turns; returns the model."""
    for module in model.modules():
        if isinstance(module, TaskLoRAWrapper):
            module.batch.ids = torch.arange(rows) % 2
    return model


def logits(model, given) -> torch.Tensor:
    ready(model, len(given["input_ids"]))
    with torch.no_grad():
        return model(**given).logits


def trainable(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def stir(model, seed: int = 5, scale: float = 0.1) -> None:
    """Move every trainable value, so that an adapter does something everywhere."""
    generator = torch.Generator().manual_seed(seed)
    active = model.active_adapter
    for name, parameter in model.named_parameters():
        # A fusion's members do not train, and start at zero here.
        if parameter.requires_grad or f"_members.{active}." in name:
            parameter.data.add_(scale * torch.randn(parameter.shape, generator=generator))
