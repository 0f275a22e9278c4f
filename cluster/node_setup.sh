#!/usr/bin/env bash
# Makes this host ready to be a node of a Ray cluster that runs psd sweeps. Safe to run again; a second run is quick.
#
#   PSD_WORK=/mnt/shared/psd bash ~/psd-sweeps/cluster/node_setup.sh
#
# PSD_WORK    where sweeps are started and their `outputs/` go; quickest is a folder that all nodes share. Without it,
#             ~/psd-work, and what the nodes make reaches the head's through the driver.
# PSD_VENV    a virtual environment to use in place of ~/.psd/venv. One that was made elsewhere is left as it is.
# PSD_PYTHON  the Python 3.11 or 3.12 to make ~/.psd/venv with. The newest on the path if unset.
#
# ~/.psd/host.sh, if a host has one, is sourced first: for what is special there.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
psd=$HOME/.psd
mkdir -p "$psd/bin"
exec 9>"$psd/lock"
flock 9 # nodes may share their home directories
if [ -f "$psd/host.sh" ]; then . "$psd/host.sh"; fi
work=${PSD_WORK:-$HOME/psd-work}
venv=${PSD_VENV:-$psd/venv}
mkdir -p "$work" || { echo "psd: PSD_WORK=$work cannot be made; mount it, or choose another" >&2; exit 1; }

# --- the virtual environment -----------------------------------------------------------------------------------------
find_python() {
    for candidate in "${PSD_PYTHON:-}" python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && path=$(command -v "$candidate") && "$path" -c \
            'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$path"
            return
        fi
    done
    echo "psd: no Python 3.11 or 3.12 with venv here; for example: sudo apt-get install -y python3.12-venv" >&2
    return 1
}

if [ "$venv" = "$psd/venv" ]; then
    wanted=$(cat "$repository/pyproject.toml" "$repository/constraints.txt" | sha256sum)
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ]; then
        python=$(find_python)
        echo "psd: installing into $venv with $python; minutes, the first time"
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
        pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c "$repository/constraints.txt")
        if ! command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
            # Without a GPU the small build will do; PyPI's brings the CUDA libraries along.
            "${pip[@]}" torch --index-url https://download.pytorch.org/whl/cpu || echo "psd: taking PyPI's torch"
        fi
        "${pip[@]}" -e "$repository"
        echo "$wanted" >"$venv/.installed"
    fi
elif ! "$venv/bin/python" -c \
    'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, ("diffusers", "optuna", "ray", "wandb"))))'; then
    echo "psd: PSD_VENV=$venv lacks what psd needs; install it there: pip install -c $repository/constraints.txt -e $repository" >&2
    exit 1
fi

# --- what every shell and every Ray process of this node is to see ---------------------------------------------------
write() { # atomically: a shell may be reading it
    cat >"$1.new"
    mv "$1.new" "$1"
}

write "$psd/env.sh" <<EOF
# Written by cluster/node_setup.sh, sourced by ~/.bashrc.
export PATH="$psd/bin:$venv/bin:\$PATH"
case ":\${PYTHONPATH:-}:" in
*":$repository:"*) ;;
*) export PYTHONPATH="$repository\${PYTHONPATH:+:\$PYTHONPATH}" ;;
esac
export PSD_WORK="$work"
# Only nodes that hold the same ~/.ray/auth_token may join, and only those who hold it may run anything.
export RAY_AUTH_MODE=token
# A node that hangs or is cut off counts as dead after about 20 s; Ray's own settings take a minute.
export RAY_health_check_initial_delay_ms=5000 RAY_health_check_period_ms=3000
export RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=4
# What Ray gives a node's agent to start; with its own 15 s a busy host, or one with a slow disk, gives up.
export RAY_agent_register_timeout_ms=120000
# \`ray job stop\` kills a sweep after three seconds otherwise; a stop saves checkpoints first.
export RAY_JOB_STOP_WAIT_TIME_S=60
# Which autoscaler this cluster runs, for those who talk to it.
export RAY_enable_autoscaler_v2=${PSD_AUTOSCALER_V2:-0}
EOF

# --- \`ray submit cluster.yaml sweeps/cfg_scale.yaml\` runs \`python ~/cfg_scale.yaml\` on the head ------------------------
write "$psd/bin/python" <<EOF
#!/usr/bin/env bash
# Written by cluster/node_setup.sh. A sweep file is run by psd, everything else by Python itself.
case "\${1:-}" in
*.yaml)
    file=\$(realpath -- "\$1")
    shift
    cd "$work"
    exec "$psd/bin/psd" sweep "\$file" "\$@"
    ;;
esac
exec "$venv/bin/python" "\$@"
EOF
write "$psd/bin/psd" <<EOF
#!/usr/bin/env bash
# Written by cluster/node_setup.sh. On a node of a cluster, psd uses the cluster; from home, where \`ray exec\` and
# \`ray attach\` start, it goes to where the outputs are.
[ "\$PWD" != "\$HOME" ] || cd "$work"
export RAY_ADDRESS="\${RAY_ADDRESS:-auto}"
exec "$venv/bin/python" -m orchestrator.cli "\$@"
EOF
# So that commands are typed there as in a checkout. Another node may be faster, where the folder is shared.
ln -sfn "$repository/sweeps" "$work/sweeps" || true
chmod +x "$psd/bin/python" "$psd/bin/psd"

# --- the first and the last line of ~/.bashrc: before it returns early, and after conda and others changed PATH ------
line="[ ! -f \"$psd/env.sh\" ] || . \"$psd/env.sh\" # psd"
touch ~/.bashrc
{ echo "$line"; grep -v '# psd$' ~/.bashrc || true; echo "$line"; } | write ~/.bashrc
[ -f ~/.bash_profile ] || [ -f ~/.bash_login ] || [ -f ~/.profile ] || echo '. ~/.bashrc' >~/.profile
if [ -f ~/.ray/auth_token ]; then chmod 600 ~/.ray/auth_token; fi
version=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("ray"))')
echo "psd: $(hostname) is ready; $("$venv/bin/python" -V), ray $version"
