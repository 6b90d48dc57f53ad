"""Lists the packages; `find:` in setup.cfg cannot add configs/ to what it finds."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["ccu_jax*"]), "ccu_jax.configs"])
