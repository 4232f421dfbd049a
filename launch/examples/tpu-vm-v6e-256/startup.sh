#!/usr/bin/env bash
set -u
exec 9> /var/lock/conan-conan-v2
flock --nonblock 9 || exit 0
cd -- /home/me/conan_jax || exit 78
command=(
  .venv/bin/python
  -m
  conan_jax
  train
  configs/conan_v2.py
  --stage
  pretrain
)
child='' stopping=0
trap 'stopping=1; trap "" TERM; [ -z "$child" ] || kill -TERM "$child"' TERM
for ((attempt = 0; attempt <= 20 && stopping == 0; attempt++)); do
  "${command[@]}" &
  child=$!
  wait "$child"
  code=$?
  if [ "$stopping" -eq 1 ]; then  # the signal ended `wait`, not the child
    wait "$child"
    code=$?
  fi
  child=''
  if [ "$code" -eq 0 ] || [ "$code" -eq 78 ] || [ "$stopping" -eq 1 ]; then break; fi
  echo "exit code $code" >&2
  sleep 10
done
exit "$code"
