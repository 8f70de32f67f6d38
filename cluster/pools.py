"""The runner of a profile."""

from __future__ import annotations

from slidecube.cluster.errors import ClusterError
from slidecube.cluster.resources import Profile
from slidecube.cluster.runner import Pool, Runner
from slidecube.cluster.threads import ThreadsPool


def open_runner(profile: Profile) -> Runner:
    """Make the runner of a profile; Dask is imported only when it is asked for.

    Raises ClusterError for a profile that is submitted and not run.
    """
    if profile.runner == "array":
        raise ClusterError(
            f"Profile {profile.name!r} is an array of jobs: use `slidecube submit FILE --profile {profile.name}`; with "
            "--dry-run it asks the scheduler and sends nothing"
        )
    deadline_s = None if profile.deadline_min is None else 60 * profile.deadline_min
    return Runner(_pool(profile), deadline_s=deadline_s)


def _pool(profile: Profile) -> Pool:
    if profile.runner == "threads":
        return ThreadsPool(profile.workers)
    from slidecube.cluster.dask import DaskPool  # noqa: PLC0415

    return DaskPool(profile)
