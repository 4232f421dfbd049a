#!/usr/bin/env bash
set -u
exec .venv/bin/python -m conan_jax launch local --processes 32 --devices-per-process 4 configs/conan_v2.py --stage pretrain
