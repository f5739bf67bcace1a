"""Peak memory of this process, from a moment on."""

from __future__ import annotations

import resource
from pathlib import Path

import torch


class PeakMemory:
    """Measures the peak resident memory (and CUDA memory) since it was created.

    On Linux the kernel's high-water mark is reset; elsewhere it is the peak of the whole process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def bytes(self) -> int:
        """The peak: device memory on CUDA, resident memory on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
