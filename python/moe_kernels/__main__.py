"""``python -m moe_kernels``: the command line."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m moe_kernels", description="Kernels for composing experts.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, back ends and settings of this installation, for bug reports")
    demo_parser = commands.add_parser("demo", help="a real language model split into experts, and real layers timed")

    from moe_kernels.commands import apply, compress, inspect, merge
    from moe_kernels.commands.arguments import CommandError, require_packages
    from moe_kernels.demo import run as demo
    from moe_kernels.demo.extras import MissingExtra

    demo.add_arguments(demo_parser)
    on_checkpoints = {"compress": compress, "apply": apply, "merge": merge, "inspect": inspect}
    for name, command in on_checkpoints.items():
        command.add_arguments(commands.add_parser(name, help=command.HELP))
    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        print_environment()
        return 0
    try:
        if arguments.command in on_checkpoints:
            require_packages(arguments.command)
            on_checkpoints[arguments.command].main(arguments)
        else:
            demo.main(arguments)
    except (MissingExtra, CommandError) as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        if arguments.command not in on_checkpoints:
            raise
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def print_environment() -> None:
    """Prints :func:`moe_kernels.env.report` as two columns."""
    from moe_kernels import env

    values = env.report()
    width = max(map(len, values))
    for key, value in values.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
