"""The command line, ``lightning-pfl``: where the rooms are put together."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_pfl.__about__ import __version__
from lightning_pfl.benchmark.suite import commands as suite
from lightning_pfl.comparison import commands as comparison
from lightning_pfl.errors import FederationError
from lightning_pfl.parties import commands as parties

__all__ = ["align", "demo", "main"]


def demo(*, quick: bool = False, output: Path = Path("demo-output"), seed: int = 0, actors: int = 2) -> None:
    """Let clients on two families of language models learn from each other on real pictures, and show what came out.

    Args:
        quick: tiny models and drawn shapes instead; nothing is downloaded.
        output: folder for results, the picture of who learned from whom, adapters and logs.
        seed: of everything.
        actors: Ray actors that clients run in; 0 runs them one after another in this process.
    """
    import dataclasses

    from rich.console import Console

    from lightning_pfl.demo.materials import PackagedMaterials
    from lightning_pfl.demo.plan import full_plan
    from lightning_pfl.demo.progress import ConsoleProgress
    from lightning_pfl.demo.report import print_report, write_report
    from lightning_pfl.demo.run import run_demo
    from lightning_pfl.demo.tiny import TinyMaterials, quick_plan
    from lightning_pfl.federation import LocalPool, RayPool

    console = Console()
    progress = ConsoleProgress(console)
    plan = dataclasses.replace(quick_plan() if quick else full_plan(), seed=seed)
    materials = TinyMaterials(output / "tiny") if quick else PackagedMaterials()

    def pool() -> LocalPool | RayPool:
        return RayPool(num_actors=actors) if actors else LocalPool()

    result = run_demo(plan, materials, output, pool=pool, progress=progress)
    print_report(plan, result, console)
    for path in write_report(plan, result, output):
        console.print(f"wrote {path}")
    progress.stage("done")


def align(
    *,
    models: list[str],
    data: list[str],
    output: Path,
    anchor: str | None = None,
    rank: int = 32,
    num_blocks: int = 4,
    target_modules: list[str] | None = None,
    rule: Literal["canonical", "least-squares", "paper", "descent"] = "canonical",
    field: str = "text",
    max_texts: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Make P and Q of one language model mean the same in others: fit their frozen bases on public texts.

    Args:
        models: folders or hub ids of causal language models, e.g. '[path/a, path/b]'.
        data: files of public texts, any fsspec path: .jsonl, or a text per line.
        output: folder to write.
        anchor: the model that the others are aligned to; the first by default. Take the smallest.
        rank: of the adapters.
        num_blocks: of the adapters.
        target_modules: names of the layers that are adapted; all linear layers of a block by default.
        rule: how bases are chosen.
        field: which field of a .jsonl holds the text.
        max_texts: read no more than so many.
        dtype: of the weights.
        seed: of the bases before they are aligned; the same as in CoLoRA.
        overwrite: an alignment that is in the folder already.
    """
    from rich.console import Console

    from lightning_pfl.commands.align import Request, align_language_models

    try:
        request = Request(
            models,
            data,
            output,
            anchor,
            rank,
            num_blocks,
            target_modules,
            rule,
            field,
            max_texts,
            dtype,
            seed,
            overwrite,
        )
        align_language_models(request, Console())
    except (ValueError, OSError) as error:
        sys.exit(f"lightning-pfl align: {error}")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        sys.exit("The command line needs jsonargparse: pip install 'lightning-pfl[cli]'")
    parser = ArgumentParser(prog="lightning-pfl", description=__doc__, version=__version__)
    commands = parser.add_subcommands(required=True)
    for function, flags in _COMMANDS.items():
        command = ArgumentParser(description=(function.__doc__ or "").split("\n", 1)[0])
        command.add_function_arguments(function, skip=set(flags))
        for flag, help_ in flags.items():
            command.add_argument(f"--{flag}", action="store_true", help=help_)
        commands.add_subcommand(function.__name__, command, help=command.description)
    of_round = ArgumentParser(description="A round of parties that exchange signed files.")
    commands.add_subcommand("round", of_round, help=of_round.description)
    steps = of_round.add_subcommands(required=True)
    for step in _ROUND:
        command = ArgumentParser(description=(step.__doc__ or "").split("\n", 1)[0])
        command.add_function_arguments(step, as_positional=False)
        steps.add_subcommand(step.__name__, command, help=command.description)
    of_suite = ArgumentParser(description="The offline suite of tasks, and methods compared on it.")
    commands.add_subcommand("benchmark", of_suite, help=of_suite.description)
    suite_steps = of_suite.add_subcommands(required=True)
    for step_of_suite, arguments in _BENCHMARK.items():
        command = ArgumentParser(description=(step_of_suite.__doc__ or "").split("\n", 1)[0])
        for name, settings in arguments:
            command.add_argument(name, **settings)
        suite_steps.add_subcommand(step_of_suite.__name__, command, help=command.description)
    chosen = parser.parse_args(args)
    if chosen.subcommand == "round":
        _run_round(parser.instantiate(chosen)["round"])
        return
    if chosen.subcommand == "benchmark":
        chosen_step = next(step for step in _BENCHMARK if step.__name__ == chosen["benchmark"]["subcommand"])
        chosen_step(**vars(chosen["benchmark"][chosen_step.__name__]))
        return
    function = next(function for function in _COMMANDS if function.__name__ == chosen.subcommand)
    function(**chosen[chosen.subcommand].as_dict())


def _run_round(chosen: Any) -> None:
    """Run one step of a round; what is wrong with files or arguments is a message and an exit code, no traceback."""
    step = next(step for step in _ROUND if step.__name__ == chosen["subcommand"])
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        sys.stdout.write(step(**vars(chosen[chosen["subcommand"]])) + "\n")
    except (FederationError, ValueError, OSError, ImportError) as error:
        sys.exit(f"lightning-pfl round {step.__name__}: {error}")


_COMMANDS: Mapping[Callable[..., None], Mapping[str, str]] = {
    demo: {"quick": "Tiny models and drawn shapes instead; nothing is downloaded."},
    align: {"overwrite": "Replace an alignment that is in the folder already."},
}
"""Per command, which of its arguments are flags, with their help."""

_BENCHMARK = {**suite.COMMANDS, **comparison.COMMANDS}
"""Commands of the suite and of comparisons, with their arguments."""

_ROUND: Sequence[Callable[..., str]] = (parties.keys, parties.roster, parties.export, parties.aggregate, parties.apply)
"""Commands of a round of parties."""


if __name__ == "__main__":
    main()
