"""What is said of a file of `torch.save` that cannot be read as data."""

from __future__ import annotations

import re
from pathlib import Path


def why_refused(path: Path, error: Exception) -> str:
    """The sentence on a file of `torch.save` that was not read with `weights_only=True`.

    torch's own message recommends to read the file as a program, which is never done here.
    """
    words = " ".join(str(error).split())
    wanted = re.search(r"(?:GLOBAL|global|class|function) ([A-Za-z_][\w]*(?:\.\w+)+)", words)
    if "weights_only" in words or "Weights only" in words or "WeightsUnpickler" in words:
        what = f"it asks for {wanted[1]}" if wanted else "it holds more than tensors"
        return (
            f"{path} is refused: {what}, and a pickle is read for its tensors alone, because more would run the"
            " program in it; look for a safetensors version, or have its maker save only the state dict"
        )
    reason = re.sub(r"^\[[^]]*\][ .]*", "", words)[:120]
    return f"{path} is not a whole file of torch.save ({reason})"
