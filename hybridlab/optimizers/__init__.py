"""An earlier name of `hybridlab.optim`, kept so that code which imports it goes on working."""

from hybridlab.optim import *  # noqa: F403
