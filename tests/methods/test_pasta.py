"""PASTA: only rows with special tokens change, and a tokenizer without any is refused."""

import pytest
import torch

from peft_service.errors import InvalidRequest
from peft_service.methods.pasta import Pasta, special
from tests.methods import bases
from tests.methods.checks import Live, Trial


def test_rows_without_special_tokens_are_answered_as_the_base_does(root):
    live = Live(Trial(Pasta(tokens=("s",)), "bert", "token_classification"), root, rate=0.05)
    for step in range(4):
        live.step(step)
    number = bases.tokenizer("bert").convert_tokens_to_ids("s")
    model = live.attached.model.eval()
    assert model.peft_config["default"].token_ids == [number]
    torch.manual_seed(0)
    ids = torch.randint(40, 200, (3, 8))
    ids[ids == number] += 1
    ids[1, 4] = number
    states = []
    for tokens in (ids.clone(), None):
        if tokens is None:
            tokens = ids.clone()
            tokens[1, 4] = number + 1
        with torch.no_grad():
            body = model.base_model.model.bert(input_ids=tokens).last_hidden_state
            for layer in model.base_model.model.bert.encoder.layer:
                layer.enable_adapters(False)
            plain = model.base_model.model.bert(input_ids=tokens).last_hidden_state
            for layer in model.base_model.model.bert.encoder.layer:
                layer.enable_adapters(True)
        states.append((body, plain))
    (with_special, plain_special), (without, plain_without) = states
    assert torch.equal(without, plain_without)
    assert torch.equal(with_special[[0, 2]], plain_special[[0, 2]])
    assert not torch.equal(with_special[1], plain_special[1])


def test_special_tokens_are_the_tokenizers_without_padding():
    tokenizer = bases.tokenizer("bert")
    found = special(tokenizer)
    assert {tokenizer.cls_token_id, tokenizer.sep_token_id} <= found
    assert tokenizer.pad_token_id not in found


def test_rows_that_have_none_are_refused(root):
    with pytest.raises(InvalidRequest, match="none of") as error:
        Live(Trial(Pasta(tokens=("<|tool|>",)), "llama", "causal_lm"), root)
    assert error.value.param == "adapter.tokens"
    with pytest.raises(InvalidRequest, match="no token 'nonsense'"):
        Live(Trial(Pasta(tokens=("nonsense",)), "llama", "causal_lm"), root)
