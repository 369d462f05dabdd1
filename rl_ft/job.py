"""What runs first in a Ray job: is this the environment that was asked for? Then rl-ft itself."""

from __future__ import annotations

import os
import platform
import sys

from rl_ft.environment import enter_storage, problem_here


def main() -> None:
    """Run rl-ft with the arguments of this process; status 2 if it cannot run here."""
    problem = problem_here()
    if problem is not None:
        print(f"rl-ft: {problem}", file=sys.stderr)
        sys.exit(2)
    enter_storage()
    print(f"rl-ft: on {platform.node()}, in {os.getcwd()}", file=sys.stderr)
    from rl_ft.cli import main as rl_ft

    sys.argv[0] = "rl-ft"
    rl_ft()


if __name__ == "__main__":
    main()
