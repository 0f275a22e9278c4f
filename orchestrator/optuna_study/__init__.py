"""The study that Optuna keeps, over any of its storages."""

from orchestrator.optuna_study.samplers import Sampling
from orchestrator.optuna_study.storage import claim_study
from orchestrator.optuna_study.study import OptunaStudy, read_records

__all__ = ["OptunaStudy", "Sampling", "claim_study", "read_records"]
