"""Ray's clusters as node_setup.sh starts them: with a token, here one of the tests' own, from the first to the last.

Ray itself switches tokens on in the middle of a process, with the first cluster that it starts or finds there, and its
older clusters then do not answer the newer ones.
"""

from __future__ import annotations

import os
import secrets

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
