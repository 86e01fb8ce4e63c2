#!/usr/bin/env bash
# install.sh: install Slurm and munge from Debian's packages (Debian 12: Slurm 22.05) as root, if they are missing.
# tests/integration/slurm/cluster.py starts and ends them.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd srun munged; do
  command -v "$program" > /dev/null && continue
  echo "installing Slurm: $program is missing"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
  break
done
