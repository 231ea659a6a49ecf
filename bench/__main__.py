"""`python -m bench [router|gateway|spawn|kernel|supervision] [--quick]`: without a name, all of them."""

from __future__ import annotations

import sys
from typing import Final

import click

from bench import gateway, kernel, measure, router, spawn, supervision
from bench.machine import NotMeasured

BENCHMARKS: Final = {
    "router": router.main,
    "gateway": gateway.main,
    "spawn": spawn.main,
    "kernel": kernel.main,
    "supervision": supervision.main,
}


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)), metavar="[NAME...]")
@click.option("--quick", is_flag=True, help="Fewer and shorter rounds: to see that it works, not to publish.")
def main(names: tuple[str, ...], quick: bool) -> None:
    """Measure llmosd on this machine: router, gateway, spawn, kernel, supervision. Prints Markdown.

    Each figure is the median of its rounds, with the lowest and the highest; a ratio is the median of the rounds'
    own ratios, whose two sides were measured one right after the other.
    """
    print(measure.this_machine())
    try:
        for name in names or BENCHMARKS:
            BENCHMARKS[name](quick)
    except NotMeasured as why:
        sys.exit(f"bench: {why}")


if __name__ == "__main__":
    main()
