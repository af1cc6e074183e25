"""A warning fails a test only if ivfast causes it: the filters of pyproject.toml."""

import warnings

import pytest


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("ivfast.ops.svgd", FutureWarning),
        ("ivfast", DeprecationWarning),
        ("test_ops", UserWarning),
        ("torch.optim.lr_scheduler", UserWarning),
        ("torch", RuntimeWarning),
    ],
)
def test_a_warning_that_ivfast_causes_is_an_error(module, category):
    with pytest.raises(category):
        warnings.warn_explicit("about our call", category, "file.py", 1, module)


@pytest.mark.parametrize(
    ("module", "category"),
    [
        ("torch.utils.cpp_extension", DeprecationWarning),
        ("torchvision.io", UserWarning),
        ("numpyro.util", FutureWarning),
    ],
)
def test_a_warning_of_a_dependency_about_itself_is_not(module, category):
    with warnings.catch_warnings(record=True) as seen:  # keeps the filters, unlike pytest.warns
        warnings.warn_explicit("about their own", category, "file.py", 1, module)
    assert len(seen) == 1


def test_a_deprecated_call_is_warned_of_here():
    with pytest.raises(DeprecationWarning):
        warnings.warn("stacklevel 1 is the line that warns", DeprecationWarning, stacklevel=1)
