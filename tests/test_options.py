"""Options and errors: frozen, strict, all mistakes in one sentence, the nearest name suggested."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from weightworks import errors
from weightworks.errors import UsageError, WeightworksError, nearest
from weightworks.options import Options


class Example(Options):
    """Options of a made-up method."""

    bits: int = Field(4, ge=2, le=8, description="Bits a weight.")
    group_size: int = Field(128, description="Columns a group.")
    damp: float = Field(0.01, gt=0, lt=1, description="Damping.")
    symmetric: bool = Field(True, description="Zero in the middle.")
    order: Literal["static", "none"] = Field("static", description="Order of columns.")

    @model_validator(mode="after")
    def _groups_fit(self) -> Example:
        if self.group_size == 0:
            raise ValueError("group_size 0 makes no group")
        return self


class Required(Options):
    """A made-up method that needs a value."""

    base: str
    rate: float = 1.0


def refusal(kind: type[Options] = Example, **values: Any) -> str:
    with pytest.raises(UsageError) as caught:
        kind.parse(values, where="quantize.gptq")
    assert caught.value.hint == "see: compress methods gptq" and caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_and_given_values() -> None:
    options = Example.parse({"bits": 3, "order": "none"}, where="quantize.gptq")
    assert options.resolved() == {"bits": 3, "group_size": 128, "damp": 0.01, "symmetric": True, "order": "none"}
    assert list(options.resolved()) == list(Example.model_fields)
    assert Example.parse(options.resolved(), where="quantize.gptq") == options


def test_unknown_option_suggests_the_nearest() -> None:
    assert refusal(bit=4) == "quantize.gptq has no option 'bit' (did you mean 'bits'?)"
    assert refusal(groupsize=4) == "quantize.gptq has no option 'groupsize' (did you mean 'group_size'?)"


def test_unknown_option_without_a_near_name_lists_all() -> None:
    known = "bits, damp, group_size, order, symmetric"
    assert refusal(teacher="x") == f"quantize.gptq has no option 'teacher' (known: {known})"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": 1}, "option 'bits' = 1: input should be greater than or equal to 2"),
        ({"bits": 9}, "option 'bits' = 9: input should be less than or equal to 8"),
        ({"damp": 0.0}, "option 'damp' = 0.0: input should be greater than 0"),
        ({"damp": 1.0}, "option 'damp' = 1.0: input should be less than 1"),
        ({"order": "dynamic"}, "option 'order' = 'dynamic': input should be 'static' or 'none'"),
    ],
)
def test_bounds(values: dict[str, Any], text: str) -> None:
    assert refusal(**values) == f"quantize.gptq: {text}"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": "4"}, "option 'bits' = '4': input should be a valid integer"),
        ({"bits": 4.0}, "option 'bits' = 4.0: input should be a valid integer"),
        ({"bits": True}, "option 'bits' = True: input should be a valid integer"),
        ({"damp": "0.01"}, "option 'damp' = '0.01': input should be a valid number"),
        ({"symmetric": 1}, "option 'symmetric' = 1: input should be a valid boolean"),
        ({"symmetric": "yes"}, "option 'symmetric' = 'yes': input should be a valid boolean"),
        ({"bits": None}, "option 'bits' = None: input should be a valid integer"),
    ],
)
def test_nothing_is_converted(values: dict[str, Any], text: str) -> None:
    assert refusal(**values) == f"quantize.gptq: {text}"


def test_whole_number_serves_as_a_fraction() -> None:
    assert Required.parse({"base": "x", "rate": 2}, where="merge.ties").rate == 2.0


def test_all_mistakes_in_one_sentence() -> None:
    text = refusal(bits=1, damp=2.0, sym=True)
    assert text.split("; ") == [
        "quantize.gptq: option 'bits' = 1: input should be greater than or equal to 2",
        "quantize.gptq: option 'damp' = 2.0: input should be less than 1",
        "quantize.gptq has no option 'sym' (known: bits, damp, group_size, order, symmetric)",
    ]


def test_mistake_of_several_options_together() -> None:
    assert refusal(group_size=0) == "quantize.gptq: group_size 0 makes no group"


def test_missing_option() -> None:
    assert refusal(Required) == "quantize.gptq: option 'base' is required"


def test_options_are_frozen() -> None:
    options: Any = Example.parse({}, where="quantize.gptq")
    with pytest.raises(ValidationError, match="frozen"):
        options.bits = 3


def test_nearest() -> None:
    assert nearest("gtpq", ["gptq", "rtn"]) == "did you mean 'gptq'?"
    assert nearest("zzz", ["rtn", "gptq"]) == "known: gptq, rtn"


def test_every_error_is_in_the_tree_and_has_its_exit_code() -> None:
    tree = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]
    codes = {kind.__name__: kind.exit_code for kind in tree if issubclass(kind, WeightworksError)}
    assert len(codes) == len(tree) > 8
    special = {name: code for name, code in codes.items() if code != 1}
    assert special == {"UsageError": 2, "DegradedError": 3, "VerificationError": 4}


def test_error_text_and_hint() -> None:
    error = WeightworksError("what happened", hint="what to do")
    assert (str(error), error.hint, WeightworksError("x").hint) == ("what happened", "what to do", "")
