"""A child process that prints how long torch and then bio_kernels took to import, and what a first operation costs.

``python -m benchmarks.child_import``; see test_import.py.
"""

import json
import sys
import time


def main() -> None:
    begin = time.perf_counter()
    import torch

    torch_done = time.perf_counter()
    import bio_kernels

    ours_done = time.perf_counter()
    imported = "triton" in sys.modules
    bio_kernels.topk_gather(torch.rand(2, 64), torch.rand(64, 4, requires_grad=True), 8).rows.sum().backward()
    told = {"torch": torch_done - begin, "bio_kernels": ours_done - torch_done}
    told |= {"first_operation": time.perf_counter() - ours_done}
    print(json.dumps(told | {"triton": [imported, "triton" in sys.modules]}))


if __name__ == "__main__":
    main()
