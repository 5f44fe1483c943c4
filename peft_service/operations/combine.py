"""Combine: one LoRA from several, by weights, with peft's own merging functions.

The sum Σ wᵢ ΔWᵢ is what the exact ways give: `cat` stacks A and B, `svd` decomposes the sum. The others
change it on purpose (TIES, arXiv:2306.01708; DARE, arXiv:2311.03099), or by construction (`linear` adds A to
A and B to B, so that products of different adapters come in). How far each is from the sum is measured.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from peft_service.errors import InvalidRequest, RunFailed
from peft_service.methods import Method
from peft_service.methods.lora import LoRA
from peft_service.operations import Described, Done, Operation, Weight, Work, nothing_besides, plain_lora

How = Literal[
    "cat",
    "svd",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
EXACT = 1e-5
"""Of the sum's norm: float32 in another order."""
MAX_RANK = 512
_BY_FACTOR = "on A and B one by one: quick, and products of different adapters come in"


class Combine(Operation):
    kind: Literal["combine"] = "combine"
    how: How = "cat"
    weights: tuple[Weight, ...] | None = Field(None, min_length=1, max_length=16)
    """One for each adapter, in their order; negative ones take away. None: equal, with sum 1."""
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    """Of the ways that end in svd. None: the sum of the adapters' ranks, so that nothing is lost."""
    density: float | None = Field(None, gt=0, le=1)
    """Share of the values that TIES, DARE and magnitude_prune keep."""
    sign: Literal["total", "frequency"] = "total"
    """How TIES elects the sign of a value: by the sum of the values, or by counting them."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Of DARE's draw."""

    title: ClassVar[str] = "Combine"
    summary: ClassVar[str] = (
        "One LoRA that is the weighted sum of several, or an approximation or pruning of it."
    )
    exact: ClassVar[bool] = False
    ways: ClassVar[dict[str, tuple[bool, str]]] = {
        "cat": (True, "A and B stacked: exactly the weighted sum; the ranks add up"),
        "svd": (
            True,
            "the sum decomposed: exact at the full rank (the default), the nearest of a smaller one",
        ),
        "linear": (False, f"the weighted sum {_BY_FACTOR}; equal ranks"),
        "ties": (False, f"TIES {_BY_FACTOR}; equal ranks"),
        "ties_svd": (
            False,
            "TIES as the paper has it: trim, elect a sign, average what agrees; then decomposed",
        ),
        "dare_linear": (False, f"DARE {_BY_FACTOR}; equal ranks"),
        "dare_linear_svd": (
            False,
            "DARE: values dropped at random and the rest scaled up, summed, decomposed",
        ),
        "dare_ties": (False, f"DARE, then TIES' election of signs, {_BY_FACTOR}; equal ranks"),
        "dare_ties_svd": (False, "DARE, then TIES' election of signs, decomposed"),
        "magnitude_prune": (False, f"only the largest values, summed {_BY_FACTOR}; equal ranks"),
        "magnitude_prune_svd": (False, "only the largest values of each update, summed, decomposed"),
    }
    takes: ClassVar[tuple[int, int]] = (1, 16)

    def check(self, sources: Sequence[Described]) -> None:
        for source in sources:
            plain_lora(source, "combine")
            nothing_besides(source, "combine")
        if self.weights is not None and len(self.weights) != len(sources):
            raise InvalidRequest(
                f"{len(self.weights)} weights for {len(sources)} adapters: give one for each, in their order",
                code="invalid_value",
                param="operation.weights",
            )
        if self.weights is not None and not any(self.weights):
            raise InvalidRequest(
                "all weights are 0, and the sum of nothing is nothing: give at least one other, or leave "
                "weights out for the mean",
                code="invalid_value",
                param="operation.weights",
            )
        prunes = self.how.startswith(("ties", "dare", "magnitude"))
        if prunes != (self.density is not None):
            raise InvalidRequest(
                f"{self.how} "
                + ("needs density, the share of values that stay: try 0.5" if prunes else "keeps all values"),
                code="invalid_value",
                param="operation.density",
            )
        decomposes = self.how.endswith("svd")
        if len(sources) == 1 and (
            prunes or self.rank is not None
        ):  # PEFT would add it linearly, whatever is asked
            raise InvalidRequest(
                f"with one adapter {self.how} prunes nothing and keeps its rank: give more, or use truncate",
                code="invalid_value",
                param="adapters",
            )
        if self.rank is not None and not decomposes:
            raise InvalidRequest(
                f"{self.how} has the rank that comes out; rank is for the ways that end in svd",
                code="invalid_value",
                param="operation.rank",
            )
        ranks = {source.reference: source.ranks for source in sources}
        if (
            self.how != "cat"
            and not decomposes
            and len({rank for each in ranks.values() for rank in each}) > 1
        ):
            raise InvalidRequest(
                f"{self.how} needs adapters of one rank, and these have "
                + ", ".join(f"{name}: {'/'.join(map(str, each))}" for name, each in ranks.items())
                + "; cat and the ways that end in svd take any",
                code="invalid_value",
                param="operation.how",
            )
        if self._rank(sources) > MAX_RANK:
            raise InvalidRequest(
                f"the ranks add up to {self._rank(sources)}, and servers take at most {MAX_RANK}: how svd "
                f"with rank {MAX_RANK} or less",
                code="invalid_value",
                param="operation.rank",
            )

    def makes(self, sources: Sequence[Described]) -> Method:
        return LoRA(rank=self._rank(sources), alpha=self._rank(sources))

    def _rank(self, sources: Sequence[Described]) -> int:
        if self.how == "cat" or self.how.endswith("svd"):
            return self.rank or sum(source.ranks[-1] for source in sources)
        return sources[0].ranks[-1]

    def run(self, work: Work) -> Done:
        import torch
        from peft import PeftModel

        from peft_service import updates

        weights = self.weights or tuple(1 / len(work.sources) for _ in work.sources)
        names = [f"source{number}" for number in range(len(work.sources))]
        model: Any = PeftModel.from_pretrained(updates.base_of(work), str(work.sources[0]), names[0])
        for name, directory in zip(names[1:], work.sources[1:], strict=True):
            model.load_adapter(str(directory), name)
        inputs = updates.probe_of(model, work)
        parts = [updates.factors_of(model, name) for name in names]
        wanted: dict[str, torch.Tensor] = {}
        for weight, part in zip(weights, parts, strict=True):
            for layer, (a_RI, b_OR, scaling, _) in part.items():
                update = weight * scaling * b_OR.double() @ a_RI.double()
                wanted[layer] = wanted[layer] + update if layer in wanted else update
        most = max(sum(max(len(each[0]) for each in part.values()) for part in parts), 1)
        rank = self.rank or most
        # Of the first adapter's config PEFT keeps what is not the others': a layer excluded there would be
        # lost, and rsLoRA would scale a result whose scaling is in its values already.
        for name in names:
            config = model.peft_config[name]
            config.target_modules, config.exclude_modules, config.use_rslora = set(wanted), None, False
            config.layers_to_transform = config.layers_pattern = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model.add_weighted_adapter(
                names,
                list(weights),
                "combined",
                combination_type=self.how,
                svd_rank=rank if self.how.endswith("svd") else None,
                density=self.density,
                majority_sign_method=self.sign,
                svd_full_matrices=False,
            )
        made, wrong = {}, {}
        for layer, (a_RI, b_OR, scaling, _) in updates.factors_of(model, "combined").items():
            wrong[layer] = wanted[layer] - scaling * b_OR.double() @ a_RI.double()
            made[layer] = (*_padded(a_RI, b_OR, rank if self.how.endswith("svd") else 0), scaling)
        error, worst = updates.relative(wrong, wanted)
        full = self.rank is None or self.rank >= most
        if (len(names) == 1 or self.ways[self.how][0]) and full and not error <= EXACT:
            raise RunFailed(
                f"{self.how} should be the weighted sum, and differs from it by {error:.2e} of its norm",
                code="combine_not_exact",
            )
        del model
        base = updates.base_of(work)
        updates.write_lora(
            base, {name: (a, b, scaling * len(a)) for name, (a, b, scaling) in made.items()}, work
        )
        summed = updates.answers(updates.added(base, wanted), inputs)
        return updates.measured(work, (error, worst), inputs, summed)


def _padded(a_RI: Any, b_OR: Any, rank: int) -> tuple[Any, Any]:
    """A and B with zeros up to the rank: PEFT's decomposition gives no more rows than a small layer has."""
    import torch

    missing = rank - len(a_RI)
    if missing <= 0:
        return a_RI, b_OR
    return (
        torch.cat([a_RI, a_RI.new_zeros(missing, a_RI.shape[1])]),
        torch.cat([b_OR, b_OR.new_zeros(len(b_OR), missing)], dim=1),
    )
