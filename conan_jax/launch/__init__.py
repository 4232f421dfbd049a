"""From a recipe to a job of the scheduler that a team already has: rendered from data, checked offline, submitted by one command."""

from conan_jax.launch.checks import Finding, check
from conan_jax.launch.folder import read, render, submit_command, write
from conan_jax.launch.spec import TARGETS, LaunchSpec

__all__ = ["TARGETS", "Finding", "LaunchSpec", "check", "read", "render", "submit_command", "write"]
