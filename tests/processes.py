"""Code in fresh processes, as a user's would be, in which packages may be missing.

Importing torch would take most of the time, so the processes are forks of one that has imported it and nothing else.
"""

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile

# reads lines of [code, environment, files for the output streams] and runs each in a fork, whose exit code it prints
SERVER = """
import json, os, sys, warnings
import torch
for line in sys.stdin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
code, environment, *streams = json.loads(line)
os.environ.clear()
os.environ.update(environment)
for number, stream in enumerate([os.devnull, *streams]):
    os.dup2(os.open(stream, os.O_RDWR), number)
exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def server():
    command = [sys.executable, "-W", "error", "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")
    atexit.register(process.communicate)
    return process


def python(code, **environment):
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        print(json.dumps([code, {**os.environ, **environment}, out.name, err.name]), file=server().stdin, flush=True)
        status = server().stdout.readline()
        if not status:
            server.cache_clear()
            raise RuntimeError("the process that forks has ended; its error stream says why")
        return subprocess.CompletedProcess(code, int(status), out.read(), err.read())


def passes(code, **environment):
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def without(*modules):
    """Code that makes importing `modules` fail as if they were not installed."""
    return f"""
import importlib.util, sys
assert not {set(modules)!r} & sys.modules.keys()
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in {modules!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {modules!r} else real(name, package)
"""


TRAIN = ("torchvision", "PIL", "sklearn", "pytorch_fid", "safetensors", "matplotlib", "tensorboard", "typer", "rich")
CORE = without(*TRAIN, "torchmetrics", "torch_fidelity")  # what `pip install .` alone gives
