#!/usr/bin/env bash
# The CPU image of deploy/Dockerfile without a container engine: its steps, read from that file, run in roots that debootstrap makes of
# the base's release; then its entry point runs as the image's user, its health check is asked, it serves requests and is stopped.
#   tests/run.sh image [--platform linux/arm64] [--record]     --record: what came of it goes to last_run.txt
# Needs root (chroot and namespaces) and the distribution's packages. The compiler's cache is lent to the build stage. An image for
# another architecture than this machine's has its programs run by QEMU.
set -euo pipefail
cd "$(dirname "$0")/../.."
deploy/install_packages.sh tests/deploy/image_packages.txt
mine="linux/$(dpkg --print-architecture)"
case " $* " in
  *" --platform $mine "*) ;;
  *" --platform "*) deploy/install_packages.sh tests/deploy/emulator_packages.txt ;;
esac
exec python3 tests/deploy/image_test.py . build/image "$@"
