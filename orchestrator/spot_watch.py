"""Instances that a cloud is about to take away: it tells them, and this tells Ray, which then drains their node.

Runs on each node of a cloud's cluster, beside Ray, which watches over none of this by itself.
Sources: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html and
https://cloud.google.com/compute/docs/instances/create-use-spot (30 s; a preempted instance says TRUE).
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from typing import Literal
from urllib.request import ProxyHandler, Request, build_opener

_log = logging.getLogger(__name__)

Cloud = Literal["aws", "gcp"]
METADATA_URLS: dict[Cloud, str] = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
LOOK_EVERY_S = 2.0
TIMEOUT_S = 5.0
_GCP_NOTICE_S = 30.0
_TOKEN_LIFE_S = 60


def watch(
    cloud: Cloud,
    url: str,
    *,
    sleep: Callable[[float], None] = time.sleep,
    now_s: Callable[[], float] = time.time,
) -> None:
    """Wait for the notice, for as long as it takes, and drain this machine's node."""
    while True:
        left_s = _left_s(cloud, url, now_s())
        if left_s is not None:
            _log.warning("this instance is taken away in %.0f s", left_s)
            if _drain(left_s):
                return
        sleep(LOOK_EVERY_S)


def _left_s(cloud: Cloud, url: str, now_s: float) -> float | None:
    """Until the instance goes; None without a notice, also where the metadata do not answer just now."""
    try:
        return _aws_left_s(url, now_s) if cloud == "aws" else _gcp_left_s(url)
    except (OSError, ValueError, KeyError):  # 404: there is none
        return None


def _aws_left_s(url: str, now_s: float) -> float:
    life = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LIFE_S)}
    token = _ask(Request(f"{url}/latest/api/token", headers=life, method="PUT"))
    notice = Request(f"{url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    return datetime.fromisoformat(json.loads(_ask(notice))["time"]).timestamp() - now_s


def _gcp_left_s(url: str) -> float | None:
    question = Request(f"{url}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})
    return _GCP_NOTICE_S if _ask(question).strip() == "TRUE" else None


def _ask(question: Request) -> str:
    direct = build_opener(ProxyHandler({}))  # the metadata are the instance's own, behind no proxy
    with direct.open(question, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def _drain(left_s: float) -> bool:
    """Whether Ray has accepted it; without an id the command means the node that it runs on."""
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"]
    command += ["--deadline-remaining-seconds", str(max(0, int(left_s)))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        _log.warning("the node could not be drained: %s", (done.stderr or done.stdout).strip())
    return done.returncode == 0
