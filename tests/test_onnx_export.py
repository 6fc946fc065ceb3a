"""torch.export and ONNX of the inference path: encoder 1's mean and B, nothing of what training needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from by_hand import adapted
from fvae_lora import export_for_inference
from tiny import BUILDERS, batch_for

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
TRAINING_ONLY = ("encoder2", "decoder_", "logvar", "log_tau")
SLOW = [("vit", True), ("bert", False), ("bert", True), ("llama", False), ("llama", True)]
CASES = [("vit", False), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def inputs_for(model: PreTrainedModel) -> dict[str, Tensor | bool]:
    batch = {name: value for name, value in batch_for(model).items() if name != "labels"}
    return batch | ({"use_cache": False} if model.config.model_type == "llama" else {})


def evaluating(kind: str, exported: Path | None = None) -> PeftModel:
    """A tiny adapted model in eval mode, or the base model with the inference-only adapter of such a one."""
    model = adapted(kind, torch.float32).eval()
    if exported is None:
        return model
    export_for_inference(model, exported)
    base = BUILDERS[kind]()
    base.load_state_dict(model.unload().state_dict())
    return PeftModel.from_pretrained(base, exported).eval()


def used_parameters(program: torch.export.ExportedProgram) -> set[str]:
    used = {node.name for node in program.graph.nodes if node.users}
    return {str(spec.target) for spec in program.graph_signature.input_specs if getattr(spec.arg, "name", "") in used}


@pytest.mark.parametrize(("kind", "inference_only"), CASES)
def test_torch_export(kind: str, inference_only: bool, tmp_path: Path) -> None:
    model = evaluating(kind, tmp_path / "small" if inference_only else None)
    inputs = inputs_for(model.get_base_model())
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)
    used = used_parameters(program)
    assert any("encoder1_mean" in name for name in used)
    assert not [name for name in used if any(part in name for part in TRAINING_ONLY)]
    assert not [node for node in program.graph.nodes if "rand" in str(node.target)]


@pytest.mark.parametrize(("kind", "inference_only"), CASES)
def test_onnx(kind: str, inference_only: bool, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = evaluating(kind, tmp_path / "small" if inference_only else None)
    inputs = inputs_for(model.get_base_model())
    target = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (), target, kwargs=inputs, dynamo=True, verbose=False)

    graph = onnx.load(target).graph
    names = [tensor.name for tensor in graph.initializer] + [name for node in graph.node for name in node.input]
    assert any("encoder1_" in name for name in names)
    assert not [name for name in names if any(part in name for part in TRAINING_ONLY)]
    assert not [node for node in graph.node if "Random" in node.op_type]

    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    logits = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4, atol=1e-5)
