# Shared by the scripts of this directory; sourced, not run.
# Gives: $top, the step display, root through sudo, the checkout's owner for builds, and packages
# unpacked below build/ without installing them.
# shellcheck shell=bash

set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$top/build
logs=$build/logs
export LC_ALL=C

fail() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# --- who runs what -------------------------------------------------------------------------------

# Taps, hugepages and apt need root: call this first in a script, with the script's arguments.
require_root() {
    if [ "$(id -u)" -eq 0 ]; then
        as_owner mkdir -p "$build"
        return
    fi
    command -v sudo >/dev/null || fail "needs root: run it as root, or install sudo"
    exec sudo -E env "PATH=$PATH" "$0" "$@"
}

# Under sudo, cargo runs as the owner of the checkout: their toolchain, and no root-owned files in
# target/. The caller's own PATH was kept by require_root.
as_owner() {
    if [ "${SUDO_UID:-0}" -ne 0 ] && [ "$(stat -c %u "$top")" = "$SUDO_UID" ]; then
        local home
        home=$(getent passwd "$SUDO_UID" | cut -d: -f6)
        setpriv --reuid "$SUDO_UID" --regid "$SUDO_GID" --init-groups \
            env "HOME=$home" "USER=${SUDO_USER:-}" "PATH=$home/.cargo/bin:$PATH" "$@"
    else
        env "PATH=${HOME:-/root}/.cargo/bin:$PATH" "$@"
    fi
}

# What root wrote below build/ goes back to the owner of the checkout.
give_back_build() {
    [ "$(id -u)" -ne 0 ] || [ ! -d "$build" ] || chown -R "$(stat -c %u:%g "$top")" "$build"
}

# --- progress ------------------------------------------------------------------------------------

now_ms() { local t=$EPOCHREALTIME; echo "$((${t/./} / 1000))"; }
seconds() { printf '%d.%d s' "$(($1 / 1000))" "$(($1 % 1000 / 100))"; }

step_number=0
step_total=${step_total:-0}

# step TEXT: a numbered line; the time is added by `done_step`.
step() {
    step_number=$((step_number + 1))
    step_start=$(now_ms)
    printf '[%d/%d] %-58s' "$step_number" "$step_total" "$1"
}
done_step() { printf ' %8s%s\n' "$(seconds $(($(now_ms) - step_start)))" "${1:+  $1}"; }

# logged NAME COMMAND...: runs it with its output in build/logs/NAME.log, whose end is shown if it
# fails. Call it as a plain command: in a condition (if, ||, &&) bash switches `set -e` off inside.
logged() {
    local log=$logs/$1.log status
    shift
    mkdir -p "$logs"
    set +e
    (set -e; "$@") >"$log" 2>&1 </dev/null
    status=$?
    set -e
    [ "$status" -eq 0 ] || show_failure "$log"
    return "$status"
}

show_failure() {
    printf ' FAILED\n\n--- the last lines of %s\n' "${1#"$top"/}"
    tail -n 40 "$1"
    printf -- '---\n'
} >&2

# --- the network ---------------------------------------------------------------------------------

# persist COMMAND...: up to four times with pauses between, where a mirror or the way to it may hiccup. One command:
# bash switches `set -e` off inside of it.
persist() {
    local pause
    for pause in 5 15 45; do
        ! "$@" || return 0
        echo "failed, once more in $pause s: $*" >&2
        sleep "$pause"
    done
    "$@"
}

# What each apt-get is told: to try again itself, to give up a dead connection, to wait for another apt.
apt_patience=(-o Acquire::Retries=3 -o Acquire::http::Timeout=60 -o DPkg::Lock::Timeout=300)

# fetch_crates MANIFEST...: every crate that their lock files name, so that no build needs the network. If some cannot
# be had, the build that needs them says so.
fetch_crates() {
    local manifest
    for manifest in "$@"; do
        persist as_owner cargo fetch --locked --target x86_64-unknown-linux-gnu --manifest-path "$manifest" || true
    done
}

# --- hugepages -----------------------------------------------------------------------------------

nr_hugepages=/proc/sys/vm/nr_hugepages
hugepages_added=0

# change_hugepages PAGES: reserves so many more, or fewer; says how many it were. Others do the same at the
# same time, so nobody writes down a total of old.
change_hugepages() {
    local before
    (
        flock 9
        before=$(cat $nr_hugepages)
        echo $((before + $1 > 0 ? before + $1 : 0)) >$nr_hugepages || true
        echo $(($(cat $nr_hugepages) - before))
    ) 9<$nr_hugepages 2>/dev/null
}

# reserve_hugepages MIB: true when that much is free in 2 MiB pages, after reserving more where the
# machine keeps enough memory for everything else. return_hugepages undoes it. Memory may be in pieces, so the
# kernel is asked more than once.
reserve_hugepages() {
    local wanted=$(($1 / 2)) free available try
    [ "$(awk '/^Hugepagesize/{print $2}' /proc/meminfo)" = 2048 ] || return 1
    free=$(awk '/^HugePages_Free/{print $2}' /proc/meminfo)
    [ "$free" -lt "$wanted" ] || return 0
    available=$(awk '/^MemAvailable/{print int($2 / 1024)}' /proc/meminfo)
    [ "$available" -ge $(($1 + 1536)) ] || return 1
    for try in 1 2 3 4 5; do
        hugepages_added=$((hugepages_added + $(change_hugepages $((wanted - free)))))
        free=$(awk '/^HugePages_Free/{print $2}' /proc/meminfo)
        [ "$free" -lt "$wanted" ] || return 0
        [ ! -w /proc/sys/vm/compact_memory ] || echo 1 >/proc/sys/vm/compact_memory
        sleep 1
    done
    return_hugepages
    return 1
}

return_hugepages() {
    [ "$hugepages_added" -le 0 ] || change_hugepages "-$hugepages_added" >/dev/null
    hugepages_added=0
}

# --- Debian packages below build/ ----------------------------------------------------------------
# A second apt with its own sources, lists and (empty) dpkg status: it resolves what the machine's
# own apt would refuse to mix, and changes nothing outside of build/.

apt_root=$build/apt

private_apt() {
    local command=$1
    shift
    "$command" -q -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt_root/sources" \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o Dir::State="$apt_root/state" -o Dir::State::Status="$apt_root/status" \
        -o Dir::Cache="$apt_root/cache" -o APT::Sandbox::User=root -o APT::Architecture=amd64 "${apt_patience[@]}" "$@"
}

private_apt_update() {
    local mirror
    # The machine's own mirror, if it has one for Debian.
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(LABEL) $(COMPONENT)' 'Created-By: Packages' 2>/dev/null |
        awk '$2 == "Debian" && $3 == "Debian" && $4 == "main" { print $1; exit }') || true
    mkdir -p "$apt_root"/{sources,state/lists/partial,cache/archives/partial}
    : >"$apt_root/status"
    cat >"$apt_root/sources/virtio-forwarder.sources" <<SOURCES
Types: deb
URIs: ${mirror:-http://deb.debian.org/debian}
Suites: bookworm bookworm-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
SOURCES
    # Else an index that could not be fetched is a warning, and its packages do not exist.
    persist private_apt apt-get update -o APT::Update::Error-Mode=any
}

has_private_apt() { compgen -G "$apt_root/state/lists/*_Packages*" >/dev/null; }

# unpack DIR PACKAGE...: downloads the packages and unpacks them into DIR.
unpack() {
    local dir=$1 package
    shift
    mkdir -p "$dir" "$apt_root/debs"
    (
        cd "$apt_root/debs"
        rm -f -- *.deb
        persist private_apt apt-get download "$@"
        for package in *.deb; do dpkg -x "$package" "$dir"; done
        rm -f -- *.deb
    )
}

# closure OPTION... PACKAGE: the package and all it depends on, as NAME=VERSION lines.
closure() {
    private_apt apt-get -s install --no-install-recommends "$@" |
        sed -nE 's/^Inst ([^ ]+) \(([^ ]+) .*/\1=\2/p'
}

# --- processes that are measured -----------------------------------------------------------------
# For scripts that have a $dir of their own and end all of ${pids[@]} on exit.

pids=()
declare -A prefixes=()

ended() { # PID
    local state
    state=$(awk '{ print $3 }' "/proc/$1/stat" 2>/dev/null) || return 0
    [ "$state" = Z ]
}

# end PID: kills what does not end within 10 s.
end() {
    local i
    kill "$1" 2>/dev/null || return 0
    for ((i = 0; i < 200; i++)); do
        ! ended "$1" || break
        sleep 0.05
    done
    kill -9 "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

wait_for() { # WHAT COMMAND...
    local what=$1 i
    shift
    for ((i = 0; i < 600; i++)); do
        ! "$@" >/dev/null 2>&1 || return 0
        sleep 0.1
    done
    echo "waited 60 s in vain for $what" >&2
    return 1
}

# start_testpmd NAME CORE TESTPMD_ARGUMENTS...: commands go to fd ${NAME}_in, output is NAME.log; $started is its id.
start_testpmd() {
    local name=$1 core=$2 fd
    shift 2
    rm -f "$dir/$name.in"
    mkfifo "$dir/$name.in"
    exec {fd}<>"$dir/$name.in"
    printf -v "${name}_in" %s "$fd"
    # Two lcores on one core: the first only waits for commands. Unbuffered: its log is read while it runs.
    stdbuf -o0 dpdk-testpmd --lcores "0@$core,1@$core" --no-pci -m 384 --no-shconf --no-telemetry --file-prefix "$name$$" "$@" \
        <"$dir/$name.in" >"$dir/$name.log" 2>&1 &
    started=$!
    pids+=("$started")
    prefixes[$name$$]=
}

# EAL leaves a directory behind for each file prefix.
forget_prefixes() {
    local prefix
    for prefix in "${!prefixes[@]}"; do rm -rf "/run/dpdk/$prefix"; done
}

# --- images of small machines --------------------------------------------------------------------

# A bzImage is a decompressor with the real kernel as payload: offset and length of the payload stand in
# its header (Documentation/arch/x86/boot.rst: setup_sects 0x1f1, payload_offset 0x248, payload_length 0x24c).
extract_vmlinux() {
    local image=$1 sectors offset length start
    field() { od -An -j "$1" -N "$2" -t "u$2" "$image" | tr -d ' '; }
    sectors=$(field $((0x1f1)) 1)
    offset=$(field $((0x248)) 4)
    length=$(field $((0x24c)) 4)
    start=$(((sectors + 1) * 512 + offset))
    # The last four bytes of the payload are its unpacked length, of no interest to the decompressor.
    head -c $((start + length - 4)) "$image" | tail -c $((length - 4)) >"$2.packed"
    case $(od -An -N 4 -t x1 "$2.packed" | tr -d ' ') in
        02214c18) lz4 -dcq ;;
        28b52ffd) zstd -dcq ;;
        fd377a58) xz -dc ;;
        *) echo "The payload of $image is packed in a format that is new to this script." >&2; return 1 ;;
    esac <"$2.packed" >"$2"
    rm "$2.packed"
    [ "$(head -c 4 "$2")" = $'\x7fELF' ] || { echo "The payload of $image is not an ELF kernel."; return 1; }
}

# add_module NAME FROM DIR: the module out of the tree FROM and, before it, those it depends on; one per line in
# DIR/order.
add_module() {
    local file name=$1 modules=$2 dir=$3 dependency
    file=$(find "$modules" \( -name "${name//_/[-_]}.ko" -o -name "${name//_/[-_]}.ko.xz" \) -print -quit)
    [ -n "$file" ] || return 0 # built in
    ! grep -qxF "$name.ko" "$dir/order" || return 0
    case $file in *.xz) xz -dc "$file" >"$dir/$name.ko" ;; *) cp "$file" "$dir/$name.ko" ;; esac
    for dependency in $(tr '\0' '\n' <"$dir/$name.ko" | sed -n 's/^depends=//p' | tr ',' ' '); do
        add_module "${dependency//-/_}" "$modules" "$dir"
    done
    strip --strip-debug "$dir/$name.ko"
    echo "$name.ko" >>"$dir/order"
}

add_busybox() {
    local applet
    mkdir -p "$1/bin"
    cp "$(command -v busybox)" "$1/bin/busybox"
    for applet in $(busybox --list); do [ -e "$1/bin/$applet" ] || ln -s busybox "$1/bin/$applet"; done
}

# pack_initramfs ROOT FILE: with scripts/guest/init as its first process.
pack_initramfs() {
    install -m 755 "$top/scripts/guest/init" "$1/init"
    (cd "$1" && find . | sort | cpio --quiet -o -H newc -R 0:0) >"$2"
}
