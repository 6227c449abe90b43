"""The `kernels/` folder at the top is shipped as the package `optimer_engine.kernels`.

It has no `__init__.py` and is never importable as plain `kernels`, since another distribution owns
that name; inside the source tree the symlink `optimer_engine/kernels` gives the same module path.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["optimer_engine", "optimer_engine.*"]),
        "optimer_engine.kernels",
    ],
    package_dir={"optimer_engine.kernels": "kernels"},
)
