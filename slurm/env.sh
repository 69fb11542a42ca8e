# shellcheck shell=bash disable=SC2034
# How this site's python is reached: sourced by the batch scripts, on the first node of a job, before srun. As it
# stands it changes nothing. Copy it, take what fits, and name the copy in SFTCORE_ENV (or edit this one).
#
# Modules and a virtual environment:
#   module load cuda/12.8
#   python=/project/venv/bin/python
#
# Offline compute nodes, caches on a shared disk:
#   export HF_HUB_OFFLINE=1 HF_HOME=/project/cache/huggingface
#   export TORCH_EXTENSIONS_DIR=/project/cache/torch_extensions     # DeepSpeed's operations are compiled once
#
# Network: the interface that nodes see each other on (NCCL and gloo guess otherwise):
#   export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
#
# Containers with enroot and pyxis (srun starts the container):
#   srun_options=(--container-image=/project/images/sftcore.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
#   python=python
#
# Containers with Apptainer (the container starts python):
#   container=(apptainer exec --nv --bind "$PWD" /project/images/sftcore.sif)
#   python=python
