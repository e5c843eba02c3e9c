"""Run a script as its command line does, with another backend of torch.compile, and of processes that share one GPU.

    torchrun --nproc_per_node 2 tests/launched.py BACKEND SCRIPT [arguments of the script]

nccl refuses two processes on one GPU; gloo takes them.
"""

from __future__ import annotations

import importlib
import sys

import conftest  # noqa: F401  (puts the project's root on the path)
import torch.distributed as dist

import engine
from lib import cli

if __name__ == "__main__":
    engine.BACKEND, name, *argv = sys.argv[1:]
    start = dist.init_process_group
    dist.init_process_group = lambda backend, **options: start("gloo", **options)
    script = importlib.import_module(name.removesuffix(".py"))
    cli.run_script(script.main, script.get_parser(), argv)
