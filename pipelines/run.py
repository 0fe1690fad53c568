"""Compose a configuration and run the whole way: ``python pipelines/run.py +experiment=coco``."""

import importlib
import logging
import os
import signal
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach main() below, which words them

import hydra
from hydra.errors import HydraException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from pipelines import schema
from pipelines.errors import RunStopped
from pipelines.progress import progress_bar

EXIT_STOPPED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
SLOW_IMPORTS = ("torch", "sparsevit.tasks", "search.engine", "pipelines.plots", "pipelines.workflow")
CONF = Path(__file__).parent.parent / "conf"


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def _main(config: schema.ConfigSchema) -> None:
    _import_with_progress()
    from pipelines.workflow import run_pipeline

    run_pipeline(config)


def main() -> None:
    """Run, and turn bad input into a message and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    schema.register()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started here ends with us
    for flag in [argument for argument in sys.argv[1:] if argument in ("-m", "--multirun")]:
        # argparse takes overrides on one side of a flag only
        sys.argv.remove(flag)
        sys.argv.append(flag)
    try:
        _main()
    except MissingMandatoryValue as error:
        _exit(f"{error.full_key or error} has no value: set it on the command line")
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(error))
    except KeyboardInterrupt:
        _exit("interrupted; what is finished is kept, and the same command goes on", EXIT_INTERRUPTED)
    except RunStopped as error:
        _exit(str(error), status=EXIT_STOPPED)
    except ValueError as error:
        if not _is_ours(error):
            raise
        _exit(str(error))


def _import_with_progress() -> None:
    """PyTorch, Ray and Optuna take seconds to import, on a cold disk many: say so.

    They come after the configuration is composed, so that a wrong one fails at once.
    """
    missing = [name for name in SLOW_IMPORTS if name not in sys.modules]
    with progress_bar(len(missing), "load PyTorch, Ray, Optuna", unit="library") as advance:
        for name in missing:
            importlib.import_module(name)
            advance()


def _is_ours(error: BaseException) -> bool:
    """Whether our own code raised it: then it is about the user's input, and worded for the user.

    What a process that loads data raises arrives under its own type, but from PyTorch's code.
    """
    from sparsevit.checkpoints import CheckpointError
    from sparsevit.data.errors import DataError

    if isinstance(error, DataError | CheckpointError):
        return True
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    raised_in = Path(traceback.tb_frame.f_code.co_filename).resolve()
    return any(
        raised_in.is_relative_to(CONF.parent / package) for package in ("sparsevit", "search", "pipelines")
    )


def _exit(message: str, status: int = EXIT_BAD_INPUT) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _explain(error: BaseException) -> str:
    """Hydra's message and its causes; the valid keys where a key is unknown."""
    if "'${experiment}_${scale}'" in str(error):
        return _choose_experiment()
    lines = [str(error).strip()]
    cause = error.__cause__ or error.__context__
    while cause is not None:
        text = str(cause).partition("\n")[0].strip()  # below it, Hydra's placeholders
        if isinstance(cause, OmegaConfBaseException) and text not in lines[0]:
            lines.append(text)
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and is_dataclass(cause.object_type):
            lines.append(f"valid keys here: {', '.join(field.name for field in fields(cause.object_type))}")
            break
        cause = cause.__cause__ or cause.__context__
    return "\n".join(lines)


def _choose_experiment() -> str:
    known = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    return f"choose an experiment: {', '.join(f'+experiment={name}' for name in known)}"


if __name__ == "__main__":
    main()
