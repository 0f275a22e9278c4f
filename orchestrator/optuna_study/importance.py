"""How much each hyper-parameter matters, as Optuna estimates it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from orchestrator.goals import Goal
from orchestrator.optuna_study.study import as_distribution
from orchestrator.search_space import SearchSpace
from orchestrator.study import TrialRecord

MIN_TRIALS = 8  # with fewer, the order of the parameters is chance
NUM_TOP = 5  # that the evaluator should have at least to look at
TOP_SHARE = 0.1  # of many trials


def param_importances(
    records: Sequence[TrialRecord], space: SearchSpace, goals: Sequence[Goal]
) -> list[dict[str, float]]:
    """For each goal the shares of the parameters in what tells the best trials from all, the largest first.

    By PED-ANOVA (arXiv 2304.10255), which also weighs parameters that not all trials have (arXiv 2601.20800). A goal
    has no shares where its trials are fewer than MIN_TRIALS or came out the same, or where fewer than two parameters
    were varied.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    told = [record for record in records if record.values and space.admits(record.params)]
    varied = [key for key in space.domains if len({record.params.get(key) for record in told}) > 1]
    if len(told) < MIN_TRIALS or len(varied) < 2:
        return [{} for _ in goals]
    distributions = {key: as_distribution(domain) for key, domain in space.domains.items()}
    shares = []
    for i, goal in enumerate(goals):
        study = optuna.create_study(direction="maximize" if goal.maximize else "minimize")
        for record in told:
            own = {key: distributions[key] for key in record.params}
            study.add_trial(create_trial(value=record.values[i], params=dict(record.params), distributions=own))
        shares.append(_shares(study, varied))
    return shares


def _shares(study: optuna.Study, params: list[str]) -> dict[str, float]:
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(TOP_SHARE, NUM_TOP / len(study.trials)))
    with warnings.catch_warnings():  # of parameters that hardly any trial has, and of values that are all the same
        warnings.simplefilter("ignore")
        shares = get_param_importances(study, evaluator=evaluator, params=params)
    return shares if len(set(shares.values())) > 1 else {}  # all the same is how Optuna says that it cannot tell
