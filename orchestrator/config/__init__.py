"""The sweep file: composed by Hydra from `conf/` and the user's YAML, then checked whole before anything starts."""

from orchestrator.config.composition import CONF
from orchestrator.config.loading import load, load_asset, load_output
from orchestrator.config.output import as_held, check_output, claim_output, holds, output_id
from orchestrator.config.sweep import LIVE, VARIANT, Sweep, SweepConfig
from orchestrator.config.trials import as_asset_settings, experiments, own_settings, plan_trial, resolve

__all__ = [
    "CONF",
    "LIVE",
    "VARIANT",
    "Sweep",
    "SweepConfig",
    "as_asset_settings",
    "as_held",
    "check_output",
    "claim_output",
    "experiments",
    "holds",
    "load",
    "load_asset",
    "load_output",
    "output_id",
    "own_settings",
    "plan_trial",
    "resolve",
]
