"""Models in the hub's form: a folder with `config.json` and `model.safetensors`.

What the tests cover: the real clients of timm and huggingface_hub, each in a process of its own,
push to and pull from a local server that speaks the hub's LFS endpoints (`tests/hub_server.py`).
Not covered: the hub itself and its default way to upload, Xet (`HF_HUB_DISABLE_XET=1` is set).
"""

from timm_varchan.hub.folder import CONFIG, save
from timm_varchan.hub.loading import SavedModel, load
from timm_varchan.hub.remote import push

__all__ = ["CONFIG", "SavedModel", "load", "push", "save"]
