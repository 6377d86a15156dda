"""One thread in this process and in every process the tests start: sums in another order are not equal bit for bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402 - after the variable is set

torch.set_num_threads(1)
