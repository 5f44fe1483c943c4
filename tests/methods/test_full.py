"""Full fine-tuning: every weight moves, and the checkpoint is a plain transformers model."""

import json

import torch
from safetensors import safe_open

from peft_service.base_model import shape_of_directory
from peft_service.methods.full import Full
from peft_service.tuners.in_place import WholeModel
from tests.methods.checks import Live, Trial
from tests.tiny import save_tiny_base


def test_every_weight_moves_and_each_is_counted_once(root):
    live = Live(Trial(Full(), "bart", "seq2seq_lm"), root)
    start = {name: p.detach().clone() for name, p in live.engine.parameters.items()}
    live.step(0)
    assert start.keys() == dict(live.engine.model.named_parameters()).keys()
    still = [name for name, p in live.engine.parameters.items() if torch.equal(p, start[name])]
    assert not still


def test_an_untied_output_layer_trains_too(tmp_path):
    from peft_service.methods import Case

    for tied in (True, False):
        directory = save_tiny_base(tmp_path / f"{tied}", tied=tied)
        shape = shape_of_directory(directory)
        assert Full().trainable(shape, Case()) == shape.body_parameters + (0 if tied else 300 * 32)
        assert (
            Full().trainable(shape, Case(task="sequence_classification", labels=("a", "b")))
            == shape.body_parameters
        )


def test_a_sharded_checkpoint_of_a_tied_model_loads_with_plain_transformers(root, tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(WholeModel, "SHARD", "40KB")
    live = Live(Trial(Full(), "t5", "seq2seq_lm"), root, rate=0.01)
    live.step(0)
    live.save(tmp_path / "made")
    shards = sorted((tmp_path / "made").glob("model-*.safetensors"))
    assert len(shards) > 2
    names = [name for shard in shards for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    assert len(names) == len(set(names)) == len(live.engine.parameters)  # the embedding once
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "made")
    assert model.lm_head.weight.data_ptr() == model.encoder.embed_tokens.weight.data_ptr()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, live.engine.parameters[name]), name
    assert json.loads((tmp_path / "made" / "config.json").read_text())["use_cache"] is True
    assert live.engine.model.config.use_cache is False
