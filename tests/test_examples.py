"""The examples run as users run them: by path, from another folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

from processes import CORE, passes

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments):
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    # typer colours its help if it detects GitHub, which would split option names
    environment = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS")}
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_svgd_bayes(tmp_path):
    from PIL import Image

    picture = tmp_path / "new" / "svgd.png"
    out = run(EXAMPLES / "svgd_bayes.py", "--steps", 60, "--particles", 50, "--out", picture)
    held_out = re.findall(r"^  (.+?) {2,}(0\.\d+) +(-\d+\.\d+)$", out, re.MULTILINE)
    names = ["maximum likelihood", "scikit-learn, C=1", "SVGD, median bandwidth", "SVGD, scale=10"]
    assert [name for name, *_ in held_out] == names
    assert all(float(accuracy) > 0.9 for _, accuracy, _ in held_out)
    # the data are separable, so maximum likelihood is overconfident in its mistakes; a posterior is not
    likelihoods = {name: float(value) for name, _, value in held_out}
    assert likelihoods["SVGD, scale=10"] > likelihoods["maximum likelihood"]
    assert out.count("of the reference's") == 2
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.size == (1100, 310)


def test_svgd_bayes_help():
    out = run(EXAMPLES / "svgd_bayes.py", "--help")
    for option in ("--steps", "--particles", "--seed", "--device", "--out"):
        assert option in out


def test_ops_needs_no_extra():
    out = passes(CORE + f"import runpy; runpy.run_path({str(EXAMPLES / 'ops.py')!r}, run_name='__main__')")
    before, after = (float(fld) for fld in re.findall(r"FLD (\d+\.\d+)", out))
    assert after < before
    assert 0 < float(re.search(r"loss (\d+\.\d+)", out)[1]) < 5  # log 5 is 1.6
