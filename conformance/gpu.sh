#!/usr/bin/env bash
# Everything of this project that needs an NVIDIA GPU, on a machine with one: conformance/gpu.sh [DIRECTORY]
#
# It makes an environment of its own beside the checkout's, and leaves in DIRECTORY (gpu-results) what each step printed, the
# reports of the conformance suite, and summary.txt: a line a step, with its exit code. A step that fails, or is not run for want
# of something, does not keep the next from being run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-results}")
venv=${VENV:-.venv-gpu}
mkdir -p "$out"
: > "$out/summary.txt"

note() { printf '%-28s %s\n' "$1" "$2" | tee -a "$out/summary.txt"; }
step() { # NAME COMMAND...
  local name=$1 start=$SECONDS code=0
  shift
  timeout 1800 "$@" > "$out/$name.txt" 2>&1 || code=$?
  note "$name" "exit code $code, $((SECONDS - start)) s: $*"
  return "$code"
}

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L > /dev/null 2>&1; then
  note everything "not run: there is no NVIDIA GPU here"
  exit 3
fi
step machine nvidia-smi -q -d MEMORY,PCI
step install bash -c "python3 -m venv '$venv' && '$venv/bin/pip' install '.[conform,native,nixl,rdt]'" || exit 1
PATH=$(realpath "$venv")/bin:$PATH
step torch python -c 'import torch; print(torch.__version__, torch.version.cuda); torch.zeros(1, device="cuda"); print(torch.cuda.get_device_name())' || exit 1
step doctor rlbridge doctor --rdma

gpus=(trainer.resources.gpus=0.1 generator.resources.gpus=0.1) # all parties of a check share the one GPU
native=(--trainer native --generator native "${gpus[@]}")
conform() { # NAME ARGUMENTS...
  local name=$1
  shift
  step "$name" rlbridge conform "$@" --report "$out/$name"
}
conform nixl "${native[@]}" --transport nixl --level faults
conform nixl-write "${native[@]}" --transport nixl transport.operation=write --from sync --level sync
conform rdt-nixl "${native[@]}" --transport rdt transport.tensor_transport=nixl --from sync --level sync
conform rdt-cuda-ipc "${native[@]}" --transport rdt transport.tensor_transport=cuda_ipc --from sync --level sync
if [ -n "$(ls /sys/class/infiniband 2> /dev/null)" ]; then
  conform nixl-rdma "${native[@]}" --transport nixl --from rdma --level rdma
else
  note nixl-rdma "not run: there is no RDMA device here"
fi
step run rlbridge run docs/examples/arithmetic.yaml name=gpu trainer.resources.gpus=0.5 generator.resources.gpus=0.5
step speed python -m rlbridge_conformance.speed --device cuda --mib 4096 --tensors 300 --json "$out/speed.json"
cat "$out/summary.txt"
