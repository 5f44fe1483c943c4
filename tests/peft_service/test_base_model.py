"""Bases: the shape read from headers is the shape torch sees; whatever could run code is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from peft_service import base_model
from peft_service.errors import UnknownBase
from peft_service.spec import Base
from tests.tiny import save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_shape_from_the_headers_is_the_shape_of_the_loaded_model(tmp_path, tied):
    directory = save_tiny_base(tmp_path, tied=tied)
    shape = base_model.inspect(f"file://{directory}").shape
    model = LlamaForCausalLM.from_pretrained(directory)
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {name: (d_out, d_in) for name, d_out, d_in in shape.linears} == linears
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.bytes == 4 * shape.parameters
    assert (shape.layers, shape.hidden, shape.vocab, shape.dtype) == (2, 32, 300, "float32")
    assert shape.tied is tied


def test_inspect_tells_what_a_user_wants_to_know(base):
    info = base_model.inspect(f"file://{base}")
    assert info.architecture == "LlamaForCausalLM"
    assert info.has_chat_template
    assert info.context_length == 256


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert", "MPNet", "Bert", "Electra"])
def test_a_row_of_the_context_length_is_the_longest_that_an_encoder_reads(kind, base, tmp_path):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, pad_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path)
    longest = base_model.inspect(f"file://{tmp_path}").context_length
    model(torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 7))


def test_inspect_and_fetch_do_not_import_torch(base):
    code = (
        "import sys; from peft_service import base_model; from peft_service.spec import Base; from pathlib "
        "import Path;"
        f"base_model.inspect('file://{base}'); base_model.fetch(Base(id='b', uri='file://{base}'), "
        f"Path('/tmp'));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_digest_changes_with_one_byte_and_not_with_the_place(base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    digest = base_model.inspect(f"file://{base}").digest
    assert base_model.inspect(f"file://{copy}").digest == digest
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert base_model.inspect(f"file://{copy}").digest != digest


def _edited(base: Path, target: Path, **changes) -> Path:
    shutil.copytree(base, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_what_cannot_be_a_base_is_refused_with_the_reason(base, tmp_path):
    pickled = shutil.copytree(base, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a safetensors file at all")
    huge = shutil.copytree(base, tmp_path / "huge")
    (huge / "model.safetensors").write_bytes(b"\xff" * 64)
    code = {"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}
    cases = {
        pickled: "no .safetensors",
        broken: "no safetensors file",
        huge: "no safetensors file",
        _edited(base, tmp_path / "code", **code): "remote code is never run",
        _edited(base, tmp_path / "encoder", architectures=["BertForMaskedLM"]): "no decoder",
        _edited(base, tmp_path / "gptq", quantization_config={"quant_method": "gptq"}): "already quantised",
        tmp_path: "no config.json",
        tmp_path / "absent": "no such directory",
    }
    for directory, reason in cases.items():
        with pytest.raises(UnknownBase, match=reason):
            base_model.inspect(f"file://{directory}")
        with pytest.raises(UnknownBase, match=reason):
            base_model.fetch(Base(id="b", uri=f"file://{directory}"), tmp_path)
    for uri in ("ftp://x", "Qwen/Qwen3", "hf://noslash", "file://relative/dir"):
        with pytest.raises(UnknownBase):
            base_model.inspect(uri)


def test_an_unreachable_hub_is_an_unknown_base_and_not_a_crash(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code = (
        "from peft_service import base_model\nfrom peft_service.errors import UnknownBase\n"
        "try: base_model.inspect('hf://org/name@main')\nexcept UnknownBase as e: print(e.message)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Hugging Face Hub" in result.stdout


def test_nf4_holds_the_linear_layers_in_four_bits(tmp_path):
    directory = save_tiny_base(tmp_path, hidden=128)
    for precision in ("fp32", "bf16"):
        plain = base_model.load(directory, precision=precision)
        stored, weights = base_model.linear_bytes(plain)
        assert stored == weights * {"fp32": 4, "bf16": 2}[precision]
        stored_nf4, weights_nf4 = base_model.linear_bytes(
            base_model.load(directory, precision=precision, quantize="nf4")
        )
        assert weights_nf4 == weights
        # 4 bits + one 8-bit scale per 64; each tensor also has two small codebooks and its shape as JSON.
        codebooks = 14 * (16 * 4 + 256 * 4 + 300)
        assert weights * 0.5 < stored_nf4 <= weights * 0.53 + codebooks
