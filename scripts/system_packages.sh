#!/usr/bin/env bash
# Installs the system packages that the tests use and that are missing. Debian and Ubuntu, as root.
# Without root, or elsewhere, it names them and goes on: tests then say what they skipped.
#
# captures    also tmux, for `make captures`.
# benchmarks  also what `make bench` measures beside hcna-ray, and a compiler for its slow disk.
set -euo pipefail

# command:package. From sshd on: what separate hosts on one machine are made of (tests/support/rig).
wanted=(
  curl:curl git:git ss:iproute2 sshd:openssh-server rsync:rsync nft:nftables iptables:iptables
  ps:procps sudo:sudo faketime:faketime initdb:postgresql systemd-analyze:systemd
  strace:strace promtool:prometheus prometheus-alertmanager:prometheus-alertmanager
  chromium:chromium chromedriver:chromium-driver
)
if [[ ${1:-} == captures ]]; then
  wanted+=(tmux:tmux)
elif [[ ${1:-} == benchmarks ]]; then
  wanted+=(redis-server:redis-server cc:gcc)
fi
# Some of them lie where only root's PATH looks, or nobody's.
PATH=$PATH:/usr/sbin:/sbin
for folder in /usr/lib/postgresql/*/bin; do
  PATH=$PATH:$folder
done

missing=()
for pair in "${wanted[@]}"; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

if ! command -v apt-get >/dev/null; then
  printf 'Missing: %s. Install them with your package manager.\n' "${missing[*]}" >&2
elif ((EUID != 0)); then
  printf 'Missing: %s. As root: apt-get install %s\n' "${missing[*]}" \
    "${missing[*]}" >&2
else
  printf 'Installing system packages: %s\n' "${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  # The tests start a PostgreSQL and an SSH server of their own; installing one must not open this
  # machine, nor set up a database on it.
  if [[ " ${missing[*]} " == *" postgresql "* &&
    ! -e /etc/postgresql-common/createcluster.conf ]]; then
    mkdir -p /etc/postgresql-common/createcluster.d
    printf 'create_main_cluster = false\n' >/etc/postgresql-common/createcluster.d/hcna-tests.conf
  fi
  policy=/usr/sbin/policy-rc.d
  if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
  fi
  if ! { apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
    { apt-get update -qq >/dev/null &&
      apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }; }; then
    printf 'They could not be installed; going on without them.\n' >&2
  fi
  if [[ " ${missing[*]} " == *" openssh-server "* ]] && command -v systemctl >/dev/null; then
    systemctl disable --quiet ssh.service ssh.socket 2>/dev/null || true # Nor at the next start.
  fi
fi
