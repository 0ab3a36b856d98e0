"""Can the judge of generated text judge? Reads config.json alone; imports no torch."""

from __future__ import annotations

from dllm_core.errors import DllmError, UnsupportedModelError
from params.errors import ParamsError
from params.schema import GridSpec
from steps.check_model import check_model


def check_judge(spec: GridSpec) -> None:
    """Check `eval.judge` as the model is checked, and what only a judge has to fulfil.

    Raises:
        DllmError: no such model, or one that cannot be loaded; of the kind that the model itself would raise.
        UnsupportedModelError: a GGUF file, whose tokenizer gives no offsets.
        ParamsError: it reads fewer tokens than a prompt and its continuation have.
    """
    judge = spec.eval.judge
    if judge == "base":
        return
    if judge.startswith("embedded:") or judge.endswith(".gguf"):
        raise UnsupportedModelError(
            f"eval.judge: '{judge}' is a GGUF file, which cannot judge.",
            "Set eval.judge to base, a model directory or a hub name.",
        )
    try:
        facts = check_model(spec.model.model_copy(update={"source": judge, "scratch": None}), dry_run=True)
    except DllmError as error:
        raise type(error)(f"eval.judge: {error.problem}", error.remedy) from None
    length = spec.data.prompt_tokens + spec.data.response_tokens
    if facts.shape.positions < length:
        raise ParamsError(
            f"eval.judge: '{judge}' reads at most {facts.shape.positions} tokens, data.prompt_tokens + "
            f"data.response_tokens is {length}.",
            "Choose a judge with more positions, or shorten the text.",
        )
