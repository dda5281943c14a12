"""``hipgpt-doctor``: checks that this machine can train and generate and that the files of its runs are intact."""

import itertools
import sys
from collections.abc import Iterable

from absl import flags

from hipgpt_jax import doctor, version
from hipgpt_jax.cli import program
from hipgpt_jax.doctor import machine, packages, runs

SUMMARY = """Check packages, devices, the cache of compiled programs and runs, and say what to do about each trouble.

JAX runs in a process of its own, so this works where JAX does not. The exit code is 1 if there is a trouble.

  hipgpt-doctor
  hipgpt-doctor --deep
  hipgpt-doctor --run-name my_run --noverify"""

FLAGS = flags.FlagValues()
_RUN_NAME = flags.DEFINE_string("run-name", None, "The one run to look at; every run if absent.", flag_values=FLAGS)
_VERIFY = flags.DEFINE_boolean(
    "verify", True, "Compare the weights of every step with their digests, which reads them whole.", flag_values=FLAGS
)
_DEEP = flags.DEFINE_boolean(
    "deep",
    False,
    "Compare the cache of compiled programs, training data and training states with their digests too.",
    flag_values=FLAGS,
)


def main() -> None:
    """Runs ``hipgpt-doctor``."""
    program.run("doctor", SUMMARY, FLAGS, _doctor)


def _doctor() -> None:
    if _DEEP.value and not _VERIFY.value:
        raise ValueError("--deep compares all digests and --noverify none: give one of them")
    about_runs = runs.examine(_RUN_NAME.value, verify=_VERIFY.value)
    first = next(about_runs)  # a name that is no run's is refused before anything is printed
    print(f"hipgpt-jax {version.__version__}")
    troubles = (
        _report("packages", packages.examine())
        + _report("machine", itertools.chain(machine.examine(), [machine.cache()]))
        + _report("runs", itertools.chain([first], about_runs))
    )
    if _DEEP.value:
        from hipgpt_jax.doctor import deep

        troubles += _report("files", deep.examine(_RUN_NAME.value))
    print(f"\n{troubles or 'no'} trouble{'s' * (troubles > 1)}" + ("" if troubles else " found"), flush=True)
    if troubles:
        sys.exit(1)


def _report(title: str, findings: Iterable[doctor.Finding]) -> int:
    """Prints findings one by one and returns the number of troubles."""
    print(f"\n{title}")
    troubles = 0
    for finding in findings:
        text = program.printable(" ".join(finding.text.split()))
        print(f"  {'TROUBLE' if finding.advice else 'ok':8}{finding.topic:18}{text}", flush=True)
        if finding.advice:
            print(f"{'':28}-> {program.printable(finding.advice)}", flush=True)
            troubles += 1
    return troubles


if __name__ == "__main__":
    main()
