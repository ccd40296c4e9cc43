"""The package list; everything else about the package is in pyproject.toml.

`kernels/` lies at the top of the repository and is installed as `fastsae.kernels`. It has no `__init__.py`: as a
regular package it would shadow Hugging Face's `kernels`, which transformers imports, for everybody who starts Python
in a checkout. In a checkout the link `fastsae/kernels -> ../kernels` makes the same name importable. find_packages
sees neither, so the name is given here. tests/test_packaging.py holds both rules.
"""

from setuptools import find_packages, setup

DATA = ["data/**", "templates/**", "static/**", "py.typed"]

setup(
    packages=[*find_packages(include=["fastsae", "fastsae.*"]), "fastsae.kernels"],
    package_dir={"fastsae.kernels": "kernels"},
    package_data={"fastsae": DATA, "fastsae.analysis": DATA, "fastsae.dashboard": DATA},
    include_package_data=False,
)
