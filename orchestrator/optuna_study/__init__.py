"""The study that Optuna keeps, over any of its storages."""

from orchestrator.optuna_study.claims import Claim, claim_study
from orchestrator.optuna_study.importance import param_importances
from orchestrator.optuna_study.samplers import Sampling
from orchestrator.optuna_study.storage import answered, exists
from orchestrator.optuna_study.study import OptunaStudy, read_records

__all__ = ["Claim", "OptunaStudy", "Sampling", "answered", "claim_study", "exists", "param_importances", "read_records"]
