"""Quick measures of a language model, with TransformerLens' names: losses, IOI, MMLU.

They tell a broken model from a working one, and models of one family apart. For figures to publish
use a library made for that.
"""

from fastlens.evals.ioi import IOIDataset, ioi_eval
from fastlens.evals.loaders import (
    DATASET_LOADERS,
    DATASET_NAMES,
    make_code_data_loader,
    make_owt_data_loader,
    make_pile_data_loader,
    make_wiki_data_loader,
)
from fastlens.evals.losses import evaluate, evaluate_on_dataset, induction_loss, sanity_check
from fastlens.evals.mmlu import (
    MMLU_ANSWER_LETTERS,
    MMLU_SUBJECTS,
    make_mmlu_data_loader,
    mmlu_eval,
)

__all__ = [
    "DATASET_LOADERS",
    "DATASET_NAMES",
    "MMLU_ANSWER_LETTERS",
    "MMLU_SUBJECTS",
    "IOIDataset",
    "evaluate",
    "evaluate_on_dataset",
    "induction_loss",
    "ioi_eval",
    "make_code_data_loader",
    "make_mmlu_data_loader",
    "make_owt_data_loader",
    "make_pile_data_loader",
    "make_wiki_data_loader",
    "mmlu_eval",
    "sanity_check",
]
