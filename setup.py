"""Hands over to pyproject.toml, where the metadata and the list of packages are.

The file stays because the native kernels will be built from here: CMakeLists.txt will describe that
build, and this file will only ask CMake for it. Until then there is nothing to compile.
"""

from setuptools import setup

setup()
