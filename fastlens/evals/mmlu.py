"""MMLU (Hendrycks et al. 2009.03300): multiple-choice questions, without examples in the prompt."""

import operator
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastlens.errors import FastlensError, TokenError, did_you_mean
from fastlens.text_datasets import load_hub_dataset

MMLU_SUBJECTS = """
abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
college_chemistry college_computer_science college_mathematics college_medicine college_physics
computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
formal_logic global_facts high_school_biology high_school_chemistry high_school_computer_science
high_school_european_history high_school_geography high_school_government_and_politics
high_school_macroeconomics high_school_mathematics high_school_microeconomics high_school_physics
high_school_psychology high_school_statistics high_school_us_history high_school_world_history
human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning
management marketing medical_genetics miscellaneous moral_disputes moral_scenarios nutrition
philosophy prehistory professional_accounting professional_law professional_medicine
professional_psychology public_relations security_studies sociology us_foreign_policy virology
world_religions
""".split()
MMLU_ANSWER_LETTERS = ["A", "B", "C", "D"]


class MMLUError(FastlensError, ValueError):
    """No such subject, or no question."""


def make_mmlu_data_loader(
    subjects: str | Sequence[str] | None = None,
    split: str = "test",
    num_samples: int | None = None,
) -> list[dict[str, Any]]:
    """Questions of MMLU from the hub (``cais/mmlu``).

    Args:
        subjects: One or several of `MMLU_SUBJECTS`; by default all.
        split: ``"test"``, ``"validation"`` or ``"dev"``.
        num_samples: The first so many of each subject; by default all.

    Returns: dicts of ``"question"``, ``"choices"`` (four strings), ``"answer"`` (0 to 3) and
        ``"subject"``.

    Raises: MMLUError for a subject that there is not; SourceError if one cannot be fetched (an
        accuracy over fewer subjects than asked would be another number).
    """
    if subjects is None:
        wanted = MMLU_SUBJECTS
    else:
        wanted = [subjects] if isinstance(subjects, str) else list(subjects)
    unknown = [subject for subject in wanted if subject not in MMLU_SUBJECTS]
    if unknown:
        near = "".join(did_you_mean(subject, MMLU_SUBJECTS) for subject in unknown)
        raise MMLUError(
            f"MMLU has no subject {', '.join(map(repr, unknown))}.{near} evals.MMLU_SUBJECTS lists "
            f"all {len(MMLU_SUBJECTS)}."
        )
    questions = []
    for subject in wanted:
        rows = load_hub_dataset("cais/mmlu", subject, split=split)
        count = len(rows) if num_samples is None else min(num_samples, len(rows))
        for index in range(count):
            row = rows[index]
            kept = {name: row[name] for name in ("question", "choices", "answer")}
            questions.append({**kept, "subject": subject})
    # TransformerLens prints here.
    print(f"Loaded {len(questions)} MMLU examples from {len(wanted)} subject(s)")  # noqa: T201
    return questions


@torch.no_grad()
def mmlu_eval(
    model: Any,
    tokenizer: Any = None,
    subjects: str | Sequence[str] | None = None,
    split: str = "test",
    num_samples: int | None = None,
    data: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The fraction of questions whose right letter is the likeliest of those offered.

    The prompt holds the question, the choices with their letters, and ``Answer:``; no examples, so
    figures are below those of the usual 5-shot test.

    Args:
        tokenizer: By default the model's.
        subjects, split, num_samples: See `make_mmlu_data_loader`.
        data: Questions of your own, as `make_mmlu_data_loader` gives; then nothing is fetched.

    Returns: ``"accuracy"``, ``"num_correct"``, ``"num_total"`` and ``"subject_scores"`` (accuracy
        by subject).

    Raises: MMLUError without questions, or for one whose answer is not the number of a choice;
        TokenError if the tokenizer has one token for two letters; and what
        `make_mmlu_data_loader` raises.
    """
    from tqdm import tqdm

    tokenizer = model.tokenizer if tokenizer is None else tokenizer
    if data is None:
        data = make_mmlu_data_loader(subjects=subjects, split=split, num_samples=num_samples)
    right: dict[str, list[bool]] = {}
    for question in tqdm(list(data), desc="Evaluating MMLU"):
        letters = _letter_tokens(tokenizer, len(question["choices"]))
        wanted = _right_answer(question)
        tokens = torch.tensor([_tokens(tokenizer, question)], device=model.cfg.device)
        logits = model(tokens, return_type="logits", attention_mask=torch.ones_like(tokens))
        answer = int(logits[0, -1, letters].argmax())
        right.setdefault(question["subject"], []).append(answer == wanted)
    if not right:
        raise MMLUError("there are no questions to ask. Check subjects, num_samples and data.")
    total = sum(len(answers) for answers in right.values())
    correct = sum(sum(answers) for answers in right.values())
    return {
        "accuracy": correct / total,
        "num_correct": correct,
        "num_total": total,
        "subject_scores": {
            subject: sum(answers) / len(answers) for subject, answers in right.items()
        },
    }


def _right_answer(question: Mapping[str, Any]) -> int:
    answer, n = question["answer"], len(question["choices"])
    try:
        number = operator.index(answer)
    except TypeError:
        number = -1
    if not 0 <= number < n:
        raise MMLUError(
            f"answer={answer!r} must be the number of a choice, 0 to {n - 1} (0 for A), in the "
            f"question {question['question'][:60]!r}."
        )
    return number


def _tokens(tokenizer: Any, question: Mapping[str, Any]) -> list[int]:
    lines = [f"Question: {question['question']}", "Choices:"]
    for letter, choice in zip(string.ascii_uppercase, question["choices"], strict=False):
        lines.append(f"{letter}. {choice}")
    prompt = "\n".join([*lines, "Answer:"])
    tokens = list(tokenizer.encode(prompt))
    # An EOS put behind by the tokenizer would end the text before the answer.
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens.pop()
    return tokens


def _letter_tokens(tokenizer: Any, n: int) -> list[int]:
    """The token of each letter with a space in front, or the first one without."""
    tokens = []
    for letter in string.ascii_uppercase[:n]:
        ids = tokenizer.encode(f" {letter}", add_special_tokens=False)
        ids = ids if len(ids) == 1 else tokenizer.encode(letter, add_special_tokens=False)
        tokens.append(ids[0])
    if len(set(tokens)) < n:
        raise TokenError(
            f"the tokenizer has no token of its own for each of the letters "
            f"{string.ascii_uppercase[:n]}: {tokens}."
        )
    return tokens
