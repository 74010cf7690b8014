"""OpenVINO reads the exported ONNX, any number of channels. `tests/clients/run openvino`"""

import pytest
import timm
import torch

from timm_varchan.export import export

pytestmark = pytest.mark.clients
openvino = pytest.importorskip("openvino", reason="tests/clients/run openvino")


@pytest.mark.parametrize(("channels", "counts"), [("anonymous", (1, 3, 5)), ("B04+B08", (2,))])
def test_exported_file(tmp_path, channels, counts):
    model = timm.create_model("dwg_test_resnet", num_classes=3).eval()
    export(model, tmp_path / "m.onnx", channels=channels, img_size=32, dynamic_size=False)
    compiled = openvino.Core().compile_model(tmp_path / "m.onnx", "CPU")
    import timm_varchan

    timm_varchan.set_channels(model, channels)
    for count in counts:
        x = torch.randn(2, count, 32, 32)
        (answer,) = compiled({"image": x.numpy()}).values()
        torch.testing.assert_close(
            torch.from_numpy(answer), model(x).detach(), rtol=1e-3, atol=1e-3
        )


def test_snippet(run_snippet):
    assert run_snippet("openvino")["logits"].shape == (2, 3)
