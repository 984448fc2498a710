"""`collm env`: versions and devices, for bug reports."""

from __future__ import annotations


def env() -> None:
    """Print versions and devices."""
    import os
    import platform
    from importlib.metadata import distributions

    import torch
    import typer

    from collm.version import __version__

    installed = {one.name: one.version for one in distributions()}
    typer.echo(f"collm         {__version__}")
    typer.echo(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "peft"):
        typer.echo(f"{package:<13} {installed.get(package, 'not installed')}")
    typer.echo(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"gpu           {', '.join(devices) or 'none'}")
