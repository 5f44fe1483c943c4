"""The operations soup and arrow: equal members give themselves, a mean is a mean, what differs is refused."""

import pytest
import torch
from peft import IA3Config
from safetensors.torch import load_file

from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods.arrow import Arrow
from peft_service.methods.lora import LoRA
from peft_service.operations import Described
from peft_service.operations.arrow import RouteByArrow
from peft_service.operations.soup import Soup
from tests.peft_service.test_operations import lora, made, on_base, plain, work
from tests.tiny import save_tiny_base

IA3 = {
    "target_modules": ["k_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
    "task_type": "CAUSAL_LM",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def described(reference, **config):
    return Described(reference, {"spec": {"method": {"kind": "lora", "rank": 4}}}, config)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_soup_of_equal_members_is_the_member(base, tmp_path, kind):
    def one(place):
        if kind == "lora":
            return lora(base, tmp_path / place)
        return made(base, tmp_path / place, IA3Config(**IA3))

    first, second = one("a"), one("b")
    Soup().run(work(base, tmp_path / "out", first, second))
    torch.testing.assert_close(on_base(base, tmp_path / "out"), on_base(base, first), rtol=0, atol=0)


def test_a_soup_is_the_mean_of_every_value(base, tmp_path):
    sources = [made(base, tmp_path / str(n), IA3Config(**IA3), seed=n) for n in range(3)]
    files = [load_file(path / "adapter_model.safetensors") for path in sources]
    done = Soup(weights=(1, 1, 2)).run(work(base, tmp_path / "out", *sources))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == files[0].keys()
    for name, tensor in found.items():
        wanted = (files[0][name].double() + files[1][name] + 2 * files[2][name]) / 4
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-7)
    assert done.facts == {"adapters": 3.0}


def test_a_soup_of_what_differs_is_refused():
    one = described("one@1", peft_type="LORA", r=4, target_modules=["q", "v"], revision="x")
    two = described("two@1", peft_type="LORA", r=4, target_modules=["v", "q"], revision="y")
    Soup().check([one, two])
    assert Soup().makes([one, two]) == LoRA(rank=4)
    with pytest.raises(InvalidRequest, match="two@1 and one@1 differ in r"):
        Soup().check([one, described("two@1", peft_type="LORA", r=8, target_modules=["q", "v"])])
    with pytest.raises(InvalidRequest, match="no PEFT adapter"):
        Soup().check([one, Described("two@1", one.record, None)])
    router = Described("x@1", {"spec": {"method": {"kind": "xlora"}}}, {"peft_type": "XLORA"})
    with pytest.raises(InvalidRequest, match="mean of choices"):
        Soup().check([router, router])
    with pytest.raises(InvalidRequest, match="not 0"):
        Soup(weights=(1, -1)).check([one, two])


def test_positions_have_no_mean(base, tmp_path):
    """SHiRA's file says by whole numbers which weights it changes: other ones of every adapter."""
    from peft import ShiraConfig

    def one(place, seed):
        config = ShiraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", random_seed=seed)
        return made(base, tmp_path / place, config, seed)

    a, b, c = one("a", 0), one("b", 1), one("c", 0)
    with pytest.raises(RunFailed, match="points to places"):
        Soup().run(work(base, tmp_path / "bad", a, b))
    Soup().run(work(base, tmp_path / "out", a, c))
    torch.testing.assert_close(on_base(base, tmp_path / "out"), on_base(base, a), rtol=0, atol=0)


def test_loras_on_other_layers_have_no_router_between_them():
    names = [described(f"{n}@1", peft_type="LORA", r=4, target_modules=[n, "v_proj"]) for n in ("q", "k")]
    with pytest.raises(InvalidRequest, match="combine takes any"):
        RouteByArrow().check(names)


def test_arrow_makes_an_artifact_of_the_method_arrow(base, tmp_path):
    from peft_service import artifact

    sources = [lora(base, tmp_path / str(n), seed=n) for n in range(2)]
    done = RouteByArrow(top_k=1).run(work(base, tmp_path / "out", *sources))
    model = artifact.load(plain(base), tmp_path / "out")
    with torch.no_grad():
        logits = model(**done.inputs).logits
    torch.testing.assert_close(logits, done.outputs["logits"], rtol=0, atol=1e-6)
    alone = [on_base(base, source) for source in sources]
    mixed = on_base(base, tmp_path / "out")
    assert all((mixed - one).abs().max() > 1e-3 for one in alone)
    names = [described("one@1", peft_type="LORA", r=4), described("two@1", peft_type="LORA", r=4)]
    made_as = RouteByArrow(top_k=1).makes(names)
    assert made_as == Arrow(sources=("one@1", "two@1"), top_k=1)
    with pytest.raises(InvalidRequest, match="general"):
        RouteByArrow(general=1).check(names)
    with pytest.raises(InvalidRequest, match="heads"):
        RouteByArrow().check([names[0], described("c@1", peft_type="LORA", r=4, modules_to_save=["score"])])
