#!/usr/bin/env bash
set -u
exec .venv/bin/python -m conan_jax launch local --processes 8 --devices-per-process 8 configs/conan_v2.py --stage pretrain
