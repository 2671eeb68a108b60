"""What is run, in a Python process of its own, to see whether a part works.

Code fails by raising; what it leaves in ``value`` is told.
"""

TRY_TORCH = """
import torch
cuda = torch.version.cuda or torch.version.hip
value = f"built for CUDA {cuda}" if cuda else "built without CUDA"
if torch.cuda.is_available():
    value += f", {torch.cuda.device_count()} device(s), first: {torch.cuda.get_device_name(0)}"
elif cuda:
    value += ", no device available"
"""

TRY_NUMPY = """
import numpy, torch
if not numpy.array_equal(torch.arange(3).numpy(), torch.from_numpy(numpy.arange(3)).numpy()):
    raise RuntimeError("torch and numpy read different numbers from the same memory")
"""

TRY_PSKD = """
import torch, pskd
logits = torch.tensor([[0.5, -0.5, 0.0]], requires_grad=True)
teacher_probs = torch.tensor([[0.6, 0.3, 0.1]])
loss = pskd.pskd_cross_entropy(logits, torch.tensor([0]), teacher_probs, 0.5)
loss.backward()
expected = logits.detach().softmax(1) - torch.tensor([[0.8, 0.15, 0.05]])
if not torch.allclose(logits.grad, expected, atol=1e-6):
    raise ArithmeticError(f"gradient {logits.grad.tolist()}, expected {expected.tolist()}")
from pskd.kernels import native
value = "" if native.is_built() else "not compiled"
"""

TRY_PLUGIN = """
import argparse, importlib.util
spec = importlib.util.find_spec("pskd_fairseq")
if spec is None:
    raise ModuleNotFoundError("No module named 'pskd_fairseq'")
value = list(spec.submodule_search_locations)[0]
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY
utils.import_user_module(argparse.Namespace(user_dir=value))
if "pskd" not in CRITERION_REGISTRY:
    raise LookupError("its import registers no criterion called pskd")
"""

TRY_TORCHVISION = """
import torchvision, torch
boxes, scores = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9]]), torch.tensor([0.9, 0.8])
if torchvision.ops.nms(boxes, scores, 0.5).tolist() != [0]:
    raise RuntimeError("nms kept a box that it should have dropped")
torchvision.ops.roi_align(torch.zeros(1, 1, 4, 4), [boxes], output_size=2)
import torchvision.models.detection
"""

TRY_CLASSIFICATION = """
import torch, pskd_classification
from torch.nn.functional import cross_entropy
model = pskd_classification.build_model("preact_resnet10_tiny", 3)
loss = cross_entropy(model(torch.zeros(2, 3, 32, 32)), torch.tensor([0, 2]))
loss.backward()
if not all(p.grad is not None for p in model.parameters()):
    raise ArithmeticError("one step left parameters without a gradient")
"""

TRY_LIGHTNING = """
import pskd_lightning
from lightning.pytorch import Trainer
Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        enable_checkpointing=False, callbacks=[pskd_lightning.PSKDCallback(num_classes=3)])
"""

TRY_TRANSFORMERS = """
import tempfile, torch, pskd_transformers
from transformers import Trainer, TrainingArguments
class PSKDTrainer(pskd_transformers.PSKDTrainerMixin, Trainer):
    pass
with tempfile.TemporaryDirectory() as folder:
    PSKDTrainer(torch.nn.Linear(2, 3), TrainingArguments(folder, report_to=[], use_cpu=True))
"""

TRY_PYCOCOTOOLS = """
import pycocotools.mask, numpy
mask = numpy.asfortranarray(numpy.eye(3, dtype=numpy.uint8))
if int(pycocotools.mask.area(pycocotools.mask.encode(mask))) != 3:
    raise RuntimeError("a mask of 3 pixels was measured wrongly")
"""

TRY_PLOT = """
import io
from matplotlib.figure import Figure
Figure().savefig(io.BytesIO(), format="png")
"""
