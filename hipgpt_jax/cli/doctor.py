"""``hipgpt-doctor``: checks that this machine can train and generate, and that the files of its runs are intact."""

import itertools
import sys
from collections.abc import Iterable

from absl import flags

from hipgpt_jax import doctor, version
from hipgpt_jax.cli import program

SUMMARY = """Check packages, devices, the compile cache and runs, and print how to solve each problem.

JAX runs in a separate process, so this also works where JAX is broken. The exit code is 1 if there is a problem.

  hipgpt-doctor
  hipgpt-doctor --deep
  hipgpt-doctor --run-name my_run --noverify"""

FLAGS = flags.FlagValues()
_RUN_NAME = flags.DEFINE_string(
    "run-name", None, "The only run to check, by name or path; every run if absent.", flag_values=FLAGS
)
_VERIFY = flags.DEFINE_boolean(
    "verify", True, "Compare the weights of every step with their SHA-256 digests.", flag_values=FLAGS
)
_DEEP = flags.DEFINE_boolean(
    "deep", False, "Also compare the compile cache, training data and training states with theirs.", flag_values=FLAGS
)


def main() -> None:
    """Runs ``hipgpt-doctor``."""
    program.run("doctor", SUMMARY, FLAGS, _doctor)


def _doctor() -> None:
    if _DEEP.value and not _VERIFY.value:
        raise ValueError("--deep compares all digests and --noverify none: give one of them")
    runs = doctor.check_runs(_RUN_NAME.value, verify=_VERIFY.value)
    first = next(runs)  # an unknown run is an error before anything is printed
    print(f"hipgpt-jax {version.__version__}")
    problems = (
        _report("packages", doctor.check_packages())
        + _report("machine", itertools.chain(doctor.check_machine(), [doctor.check_cache()]))
        + _report("runs", itertools.chain([first], runs))
    )
    if _DEEP.value:
        problems += _report("files", doctor.check_files(_RUN_NAME.value))
    print("\n1 problem" if problems == 1 else f"\n{problems or 'no'} problems", flush=True)
    if problems:
        sys.exit(1)


def _report(title: str, checks: Iterable[doctor.Check]) -> int:
    """Prints checks as they are made and returns the number of problems."""
    print(f"\n{title}")
    problems = 0
    for check in checks:
        text = program.printable(" ".join(check.text.split()))
        print(f"  {'PROBLEM' if check.advice else 'ok':8}{check.topic:18}{text}", flush=True)
        if check.advice:
            print(f"{'':28}-> {program.printable(program.with_commands(check.advice))}", flush=True)
            problems += 1
    return problems


if __name__ == "__main__":
    main()
