"""Mixed-precision training: loss scaling with fused unscale, check and clip, and float32 master weights.

Autocast in Python is ``torch.autocast``; in C++ programs it is ``quantrain::amp::AutocastGuard``.
"""

from quantrain.amp.grad_scaler import GradScaler
from quantrain.amp.master_weights import MasterWeights

__all__ = ["GradScaler", "MasterWeights"]
