#!/usr/bin/env bash
# install.sh: Slurm's and munge's programs from Debian's packages (12: Slurm 22.05), as root. A second call does nothing.
# What is started with them, and ended, is tests/integration/slurm/cluster.py's.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd srun munged; do
  command -v "$program" > /dev/null && continue
  echo "installing Slurm: $program is missing"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
  break
done
