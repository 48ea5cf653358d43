#!/bin/bash
# Install what .ci/ needs on a Debian machine, as root, without asking anything.
# Run it as often as you like: what is already there costs less than a second.
# With names of network file systems (cephfs, glusterfs, moosefs) it installs those instead: for check_growth.py.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive

packages=(
    # programs that send
    swaks libnet-ssleay-perl curl msmtp s-nail
    # programs that fetch or read the store
    fetchmail mpop getmail6 mutt dovecot-pop3d dovecot-imapd
    # servers to talk to and to be measured against; smtp-source and smtp-sink come with Postfix
    postfix nsd unbound
    # the machine's own workings
    iproute2 strace faketime openssl netcat-openbsd procps python3-venv
    # signatures and forwards, judged by others
    opendkim opendkim-tools postsrsd
    # disks whose power fails
    e2fsprogs xfsprogs btrfs-progs
    # another Python; what the shared cases build their traps with
    pypy3 gcc libc6-dev
    # the web inbox
    chromium chromium-driver fonts-dejavu-core
)
# The two clients of Mailpit's API are what check_web.py runs unchanged against ours; so is the one from npm below.
venv_packages=(mypy ruff aiosmtpd mailpit-api-client pytest-mailpit)
npm_packages=(mailpit-api)
venv=${XDG_CACHE_HOME:-$HOME/.cache}/minimail-ci

missing_packages() {
    local package
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

# The packages' servers must not start: the checks run their own, on their own ports.
forbid_services() {
    [ -e /usr/sbin/policy-rc.d ] && return
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
}

install_packages() {
    local missing
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] && return
    forbid_services
    echo "postfix postfix/main_mailer_type select Local only" | debconf-set-selections
    apt-get update -qq
    # Waits for another apt-get on the same machine instead of failing.
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=300 "${missing[@]}"
}

install_venv() {
    [ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
    "$venv/bin/python" -c '
import importlib.metadata, sys
for name in sys.argv[1:]:
    importlib.metadata.version(name)' "${venv_packages[@]}" 2>/dev/null && return
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${venv_packages[@]}"
}

install_npm() {
    local name
    for name in "${npm_packages[@]}"; do
        [ -d "$venv/npm/node_modules/$name" ] || npm install --silent --no-audit --no-fund --prefix "$venv/npm" "$name"
    done
}

declare -A shared=(
    [cephfs]="ceph-mon ceph-osd ceph-mds ceph-fuse"
    [glusterfs]="glusterfs-server glusterfs-client"
    [moosefs]="moosefs-master moosefs-chunkserver moosefs-client"
)
if [ $# -gt 0 ]; then
    packages=()
    for name; do
        packages+=(${shared[$name]})
    done
    install_packages
    exit
fi

# Where the machine brings Node.js from elsewhere, leave it alone.
command -v npm >/dev/null || packages+=(nodejs npm)

install_packages
install_venv
install_npm
