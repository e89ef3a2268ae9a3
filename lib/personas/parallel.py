"""Independent jobs side by side, on this machine's cores or on a Ray cluster (profile key `cluster`)."""

import concurrent.futures
import contextlib
import importlib.util
import multiprocessing
import os
import socket
import sys
import threading
import warnings
from pathlib import Path

import torch

from personas import progress, store
from personas.profile import Profile


class WorkError(RuntimeError):
    """A run failed, or the cluster cannot be used; the message says which and what to do. What is done
    stays in the store."""


@contextlib.contextmanager
def workers(profile: Profile, most: int):
    """Something with `submit(f, *args) -> Future` that runs at most `most` at once: on the cluster that
    the profile names, one GPU each if it wants one (keys are not sent there: set them where its machines
    were started); else on this machine, one core each, or one after the other on its GPU."""
    if profile.cluster:
        yield from _ray(profile, most)
    else:
        here = 1 if profile.device == "cuda" else min(most, os.cpu_count() or 1)
        given = (profile.device == "cpu", dict(os.environ), store.ROOT)
        with concurrent.futures.ProcessPoolExecutor(here, _context(profile), _start, given) as pool:
            yield pool


def _context(profile: Profile):
    """How processes start. To import the libraries takes each ten seconds or more. On Linux, on a CPU, they
    are therefore forked from one process that has imported them and done nothing else; elsewhere they start
    afresh (a GPU's driver does not survive a fork)."""
    if profile.device != "cpu" or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["personas.finetune", "personas.stats"])
    return found


def side_by_side(jobs: dict, profile: Profile, what: str, most: int | None = None, total: int | None = None):
    """Yield (name, result) of each job as it is done. jobs: name -> (function, *arguments), which must
    pickle. total: for the progress bar, of which those not among the jobs are done. Raises WorkError
    naming the job that failed; store.StoreError as it is."""
    bar = progress.Bar(
        total=total or len(jobs),
        initial=(total or len(jobs)) - len(jobs),
        desc=what,
        unit="cell",
    )
    with bar, workers(profile, min(most or len(jobs), len(jobs))) as pool:
        waiting = {pool.submit(*job): name for name, job in jobs.items()}
        try:
            for done in concurrent.futures.as_completed(waiting):
                yield waiting[done], done.result()
                bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, (KeyboardInterrupt, GeneratorExit, store.StoreError)):
                raise
            cause = getattr(error, "cause", None) or error  # Ray wraps it
            raise WorkError(f"{what}, {waiting[done]}: {type(cause).__name__}: {cause}") from error


def _start(one_core: bool, environment: dict, root: Path) -> None:
    """A worker's start: one core, its parent's environment and store as they are now (but what libraries read
    when they are imported, such as HF_HOME, is that of the first worker's start), and an end with its parent,
    however that ends (a killed pool's workers would wait for ever)."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.environ.clear()
    os.environ.update(environment)
    store.ROOT = root
    _settle(one_core)


def _settle(one_core: bool) -> None:
    if one_core:
        torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # transformers' and TRL's, once for every process


class _Ray:
    """Ray's tasks as futures."""

    def __init__(self, ray, profile: Profile):
        gpu = profile.device == "cuda"
        self.task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=0)(_on_ray)
        self.ray, self.one_core, self.refs = ray, not gpu, []

    def submit(self, f, *args) -> concurrent.futures.Future:
        self.refs.append(self.task.remote(self.one_core, f, args))
        return self.refs[-1].future()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        for ref in self.refs if cancel_futures else ():
            self.ray.cancel(ref, force=True)


def _on_ray(one_core: bool, f, args):
    _settle(one_core)
    return f(*args)


def _ray(profile: Profile, most: int):
    if importlib.util.find_spec("ray") is None:
        raise WorkError(
            f"profile {profile.name} names a Ray cluster, and ray is not installed: pip install -c "
            "constraints.txt ray, or take out `cluster`"
        )
    import ray

    here = profile.cluster == "local"
    named = {
        n: os.environ[n]
        for n in ("PERSONAS_RUNS", "PERSONAS_FIGURES", "HF_HUB_OFFLINE", "HF_HOME", "PYTHONPATH")
        if n in os.environ
    } | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    try:
        host, _, port = profile.cluster.removeprefix("ray://").partition(":")
        if port:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(
            **(
                {"num_cpus": min(most, os.cpu_count() or 1), "include_dashboard": False}
                if here
                else {"address": profile.cluster}
            ),
            runtime_env={"env_vars": named},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkError(
            f"no Ray cluster at {profile.cluster!r} ({str(error).splitlines()[0][:200]}); start one with "
            "`ray start --head`, or set `cluster: local`"
        ) from None
    try:
        yield _Ray(ray, profile)
    finally:
        ray.shutdown()
