# Sourced by quickstart.sh and test.sh: makes a virtual environment in $VENV (default .venv) and activates it.
make_environment() { # requirements file
  local venv=${VENV:-.venv} python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed ($("$python" --version) found); set PYTHON" >&2
    exit 2
  }
  command -v g++ >/dev/null || {
    echo "error: g++ is needed: DeepSpeed compiles some of its operations at first use" >&2
    exit 2
  }
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  # shellcheck disable=SC1091
  source "$venv/bin/activate"
  echo "installing $1 into $venv"
  python -m pip install --quiet --disable-pip-version-check --retries 5 -r "$1"
}
