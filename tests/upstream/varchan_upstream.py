"""Pytest plugin that makes timm's own test modules collect our twins instead of timm's models.

timm's tests choose models by the names of their architectures, so the plugin lets them ask for the
base names and adds the prefix. Used as `pytest -p varchan_upstream timm-*/tests/test_models.py`.
"""

import os

import timm

import timm_varchan  # noqa: F401

BASES = tuple(os.environ["VARCHAN_UPSTREAM_BASES"].split(","))
_list_models = timm.list_models

timm.list_models = lambda *args, **kwargs: [
    f"dwg_{name}" for name in _list_models(*args, **kwargs) if name.split(".")[0] in BASES
]
