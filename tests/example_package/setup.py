"""A package that announces a method of its own, and one that cannot be imported."""

from setuptools import setup

setup(
    name="letheon-example",
    version="0.1",
    py_modules=["fading"],
    entry_points={
        "letheon.methods": ["fading = fading:Fading", "broken = fading_that_is_not_there:Nothing"]
    },
)
