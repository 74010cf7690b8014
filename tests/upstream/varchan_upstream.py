"""Pytest plugin that makes timm's own test modules collect our models instead of timm's.

timm's tests choose models by the names of their architectures, so the plugin lets them ask for the
base names and adds the prefix; our own architectures are asked for as they are. Used as
`pytest -p varchan_upstream timm-*/tests/test_models.py`.
"""

import os

import timm
from timm.models import _registry

import timm_varchan  # noqa: F401

BASES = tuple(os.environ["VARCHAN_UPSTREAM_BASES"].split(","))
OWN = set(timm.list_models(module="rrdb"))
_list_models = timm.list_models

# some tests ask for the models of timm's modules that extract features
_registry._module_to_models["resnet"].update(OWN)

timm.list_models = lambda *args, **kwargs: [
    model
    for name in _list_models(*args, **kwargs)
    if name.split(".")[0] in BASES
    for model in ([name] if name.split(".")[0] in OWN else []) + [f"dwg_{name}"]
]
