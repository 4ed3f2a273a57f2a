# Shared by the scripts in this directory; to be sourced, not run.
# Everything here may be called again and again: what is already there is left alone.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}

# What the tests and the quick start use from Debian. fio and qemu-storage-daemon are measured against,
# the cloud kernel and busybox are the guest; the store is tested on ext4 and xfs on loop devices; hosts with cut links
# are network namespaces.
PACKAGES=(
    qemu-system-x86 qemu-utils qemu-block-extra seabios ipxe-qemu
    linux-image-cloud-amd64 busybox-static cpio
    e2fsprogs xfsprogs mount iproute2 nftables
    fio libnbd-bin nbdkit nbd-client jq build-essential curl ca-certificates
)
# All QEMU packages must be of one version; see need_packages.
QEMU_PACKAGES=(qemu-system-x86 qemu-utils qemu-block-extra)

say()  { printf '%s\n' "$*"; }
die()  { printf 'error: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this step needs root, and there is no sudo: $*"
    fi
}

installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# Installs those of PACKAGES that are missing; without any missing, apt is not touched.
need_packages() {
    command -v apt-get >/dev/null || die "only Debian and its relatives are set up automatically. \
Install QEMU with its tools, fio, libnbd, nbdkit, busybox (static), cpio, e2fsprogs, xfsprogs, jq, gcc and a kernel with virtio modules"
    local p missing=()
    for p in "${PACKAGES[@]}"; do
        installed "$p" || missing+=("$p")
    done
    if [ ${#missing[@]} = 0 ]; then
        return 0
    fi
    say "installing with apt: ${missing[*]}"
    local log
    log=$(mktemp)
    if ! install_missing "${missing[@]}" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "apt could not install: ${missing[*]} (whole output: $log)"
    fi
    rm -f "$log"
}

# The QEMU packages are pinned to the version of qemu-system-x86: a machine may come with newer QEMU tools
# (backports) that cannot be installed beside the QEMU of the release.
install_missing() {
    as_root apt-get update || return 1
    local version p arguments=()
    version=$(apt-cache policy qemu-system-x86 | awk '/Candidate/{print $2}')
    for p in "$@"; do
        case " ${QEMU_PACKAGES[*]} " in
            *" $p "*) ;;
            *) arguments+=("$p") ;;
        esac
    done
    for p in "${QEMU_PACKAGES[@]}"; do
        arguments+=("$p=$version")
    done
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        --allow-downgrades "${arguments[@]}"
}

# Finds cargo, or installs Rust for this user in the official way (https://rustup.rs).
need_cargo() {
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    if command -v cargo >/dev/null; then
        return 0
    fi
    say "there is no Rust here: installing it for this user with rustup"
    local setup
    setup=$(mktemp)
    curl --proto '=https' --tlsv1.2 -sSf -o "$setup" https://sh.rustup.rs \
        || die "could not download rustup. Install Rust (https://rustup.rs), then run this again"
    sh "$setup" -y --profile minimal --no-modify-path >&2 || die "rustup failed; see above"
    rm -f "$setup"
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
}

# build PROFILE PACKAGE... : PROFILE is release or debug.
build() {
    local profile=$1 p arguments=()
    shift
    if [ "$profile" = release ]; then
        arguments+=(--release)
    fi
    for p in "$@"; do
        arguments+=(-p "$p")
    done
    (cd "$ROOT" && cargo build --quiet "${arguments[@]}") || die "the build failed; see above"
}

# free_ports N : N different TCP ports of 127.0.0.1 that nobody listens on right now.
free_ports() {
    python3 - "$1" <<'PY'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in held))
PY
}

# wait_for SECONDS WHAT COMMAND... : until COMMAND succeeds.
wait_for() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -ge $until ]; then
            say "waited in vain for: $what" >&2
            return 1
        fi
        sleep 0.05
    done
}

# append_script SCRIPT INITRD : the guest image with SCRIPT as what the guest runs (see guest-image).
append_script() {
    local dir base
    base=$TARGET/qemu/base.cpio.gz
    dir=$(mktemp -d)
    cp "$1" "$dir/test"
    cp "$base" "$2"
    # The kernel takes archives one after another if each begins at a multiple of four bytes.
    truncate -s %4 "$2"
    (cd "$dir" && echo test | cpio --quiet -o -H newc) >>"$2"
    rm -rf "$dir"
}

# boot_guest INITRD CONSOLE_LOG DISK_ARGUMENT... : QEMU without KVM; what the script prints is QEMU's stdout. The disk
# arguments are those of disk_vhost_user or disk_nbd. no_timer_check: on a busy machine ticks come too late for the
# kernel's check of the timer, which then panics ("IO-APIC + timer doesn't work!").
boot_guest() {
    local initrd=$1 console=$2
    shift 2
    qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -accel tcg \
        -machine q35,memory-backend=memory -m 256M \
        -object memory-backend-memfd,id=memory,size=256M,share=on \
        -serial "file:$console" -serial stdio -append "console=ttyS0 panic=-1 quiet no_timer_check" \
        -kernel "$TARGET/qemu/vmlinuz" -initrd "$initrd" "$@" </dev/null
}
